"""Refusing bad settings early, with the value and the way out."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

CLOSURE_HELP = """KBFGS evaluates the loss twice a step and needs a closure, as torch.optim.LBFGS:

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
    fraction("decay", settings["decay"])
    not_negative("weight_decay", settings["weight_decay"])


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


def needed(closure: Callable[[], Tensor] | None) -> Callable[[], Tensor]:
    """The closure; TypeError with an example if there is none."""
    if closure is None:
        raise TypeError(CLOSURE_HELP)
    return closure
