"""Damping: PyTorch's learning-rate schedulers, pointed at an optimizer's damping."""

from collections.abc import Iterator, MutableMapping
from typing import Any

from torch.optim import Optimizer


class DampingGroup(MutableMapping[str, Any]):
    """One parameter group in which what is called lr is the damping.

    "initial_lr" is its "initial_damping", likewise "max_lr", "min_lr" and "swa_lr", so that the
    notes of a scheduler of the true learning rate stay apart. All else is the group's own. The
    optimizer is asked at each access, for load_state_dict gives that new groups.
    """

    def __init__(self, optimizer: Optimizer, index: int) -> None:
        self._optimizer = optimizer
        self._index = index

    def __getitem__(self, key: str) -> Any:
        return self._group[_true_name(key)]

    def __setitem__(self, key: str, value: Any) -> None:
        self._group[_true_name(key)] = value

    def __delitem__(self, key: str) -> None:
        del self._group[_true_name(key)]

    def __iter__(self) -> Iterator[str]:
        return (_rate_name(key) for key in self._group if not _is_rate(key))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def _group(self) -> dict[str, Any]:
        return self._optimizer.param_groups[self._index]


def _is_rate(key: str) -> bool:
    return key == "lr" or key.endswith("_lr")


def _true_name(key: str) -> str:
    return key.removesuffix("lr") + "damping" if _is_rate(key) else key


def _rate_name(key: str) -> str:
    is_damping = key == "damping" or key.endswith("_damping")
    return key.removesuffix("damping") + "lr" if is_damping else key


class Damping(Optimizer):
    """View of an optimizer for torch.optim.lr_scheduler: its groups' "lr" is the damping.

    Any scheduler will do that leaves momentum alone (cycle_momentum=False). The damping travels in
    the optimizer's state_dict, the scheduler's place in its own. Groups are those the optimizer has
    when the view is made; it refuses to step while the damping of one is not positive.

    Raises: ValueError for an optimizer without damping.

        >>> from torch import nn
        >>> from torch.optim.lr_scheduler import CosineAnnealingLR
        >>> from kronscope.optim import KFAC
        >>> damping = Damping(KFAC(nn.Linear(3, 2), damping=1.0))
        >>> scheduler = CosineAnnealingLR(damping, T_max=100, eta_min=0.01)
        >>> damping.param_groups[0]["lr"]
        1.0
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Damping views an optimizer, got {type(optimizer).__name__}")
        for group in optimizer.param_groups:
            if "damping" not in group:
                known = sorted(key for key in group if key != "params")
                raise ValueError(
                    f"{type(optimizer).__name__} has no 'damping' in its param_groups; they have "
                    f"{known}"
                )
        super().__init__([{"params": g["params"]} for g in optimizer.param_groups], {})
        groups = [DampingGroup(optimizer, i) for i in range(len(optimizer.param_groups))]
        self.param_groups = groups  # type: ignore[assignment]
        optimizer.register_step_pre_hook(_refuse)
        # a scheduler warns if the step() of what it was given has not been called before its own
        optimizer.register_step_post_hook(lambda *_: self.step())

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Do nothing: called after each step of the optimizer, for schedulers that watch it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise TypeError: a view has nothing to load."""
        raise TypeError(
            f"Damping has no state to load (got {sorted(state_dict)}); load the optimizer's and "
            "the scheduler's"
        )


def _refuse(optimizer: Optimizer, *_: Any) -> None:
    """Raise ValueError unless every group's damping is positive."""
    for i, group in enumerate(optimizer.param_groups):
        if not 0 < group["damping"] < float("inf"):
            raise ValueError(
                f"the damping of group {i} is {group['damping']!r}, it must be positive to step; "
                "keep the scheduler above zero, as with eta_min of CosineAnnealingLR"
            )
