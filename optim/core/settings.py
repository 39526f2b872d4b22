"""Validation of optimizer settings; errors state the value and the allowed range."""

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from torch import Tensor, nn

STRANGERS = "{} parameters of the groups are not in {}"
OWN = ("lr", "damping", "momentum", "decay", "weight_decay", "decoupled_weight_decay")
CLOSURE_HELP = """{} evaluates the loss twice a step and needs a closure, as torch.optim.LBFGS:

    def closure():
        opt.zero_grad()
        loss = criterion(model(x), t)
        loss.backward()
        return loss

    opt.step(closure)"""


def positive(name: str, value: float) -> None:
    """Raise ValueError unless 0 < value < inf."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def limit(name: str, value: float | None) -> None:
    """Raise ValueError unless value > 0; infinity is none."""
    if value is None or not value > 0:
        raise ValueError(f"{name} must be positive, or infinite for none, got {value!r}")


def not_negative(name: str, value: float) -> None:
    """Raise ValueError unless 0 <= value < inf."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be zero or positive, got {value!r}")


def fraction(name: str, value: float) -> None:
    """Raise ValueError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")


def at_least_one(name: str, value: int) -> None:
    """Raise ValueError unless value is an integer >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def common(settings: dict[str, Any]) -> None:
    """Check the settings all optimizers share: lr, damping, momentum, decay, weight_decay."""
    not_negative("lr", settings["lr"])
    positive("damping", settings["damping"])
    fraction("momentum", settings["momentum"])
    if "decay" in settings:
        fraction("decay", settings["decay"])
    not_negative("weight_decay", settings["weight_decay"])


def periods(settings: dict[str, Any]) -> None:
    """Check update_every and refresh_every where the method has them."""
    for name in ("update_every", "refresh_every"):
        if name in settings:
            at_least_one(name, settings[name])


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The model's trainable parameters; ValueError if there are none."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the first argument is the model (an nn.Module), got {type(model).__name__}; the "
            "optimizer finds the layers itself, do not pass model.parameters()"
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no parameter with requires_grad=True")
    return parameters


def grouped(
    model: nn.Module, groups: list[dict[str, Any]] | None, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """The trainable parameters in groups as torch wants them: the rest first, then `groups`.

    groups: as for torch.optim: {"params": parameters of the model, "lr": ..., "damping": ...}.
    Settings other than `OWN` are shared by all groups.

    Raises: ValueError for a bad setting, a stranger's parameter or one in two groups.
    """
    every = trainable(model)
    if groups is None:
        return [{"params": every}]
    taken: list[Tensor] = []
    made = []
    for group in groups:
        if "params" not in group:
            raise ValueError(f"a group needs 'params', got {sorted(group)}")
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        params = [p[1] if isinstance(p, tuple) else p for p in params]  # named ones too
        made.append({**group, "params": [p for p in params if p.requires_grad]})
        group_settings({**settings, **group}, [k for k in group if k != "params"])
        taken += made[-1]["params"]
    if len(set(taken)) < len(taken):
        raise ValueError("a parameter stands in two of the groups")
    if strangers := len(set(taken) - set(every)):
        raise ValueError(STRANGERS.format(strangers, type(model).__name__))
    rest = [p for p in every if p not in set(taken)]
    return [{"params": rest}, *made] if rest else made


def group_settings(settings: dict[str, Any], own: list[str]) -> None:
    """Check one group's settings, of which it brings its `own`."""
    common(settings)
    if shared := [name for name in own if name not in OWN]:
        raise ValueError(f"{shared} cannot differ between groups; those that can: {list(OWN)}")


def joined(groups: list[dict[str, Any]], defaults: Iterable[str], model: nn.Module) -> None:
    """Give the group added last the step number; ValueError, and the group is removed, if bad."""
    first, new = groups[0], groups[-1]
    new["step"] = first["step"]
    # schedulers leave notes of their own in the groups they know
    differing = [k for k in defaults if new[k] != first[k]]
    try:
        group_settings(new, differing)
        if strangers := len(set(new["params"]) - set(model.parameters())):
            raise ValueError(STRANGERS.format(strangers, type(model).__name__))
    except ValueError:
        groups.pop()
        raise


def choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError unless the value is one of the known."""
    if value not in known:
        raise ValueError(f"no {name} {value!r}; known: {list(known)}")


def no_copy(optimizer: Any, _: Any) -> NoReturn:
    """`__reduce_ex__` that raises TypeError: a copied optimizer would lose its hooks."""
    raise TypeError(
        f"{type(optimizer).__name__} cannot be copied or pickled: it has hooks in its model; build "
        "another on the copied model and give it this one's state_dict()"
    )


def needed(closure: Callable[[], Tensor] | None, who: str = "KBFGS") -> Callable[[], Tensor]:
    """The closure; TypeError with an example if there is none."""
    if closure is None:
        raise TypeError(CLOSURE_HELP.format(who))
    return closure
