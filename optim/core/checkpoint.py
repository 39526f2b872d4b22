"""Loading a state_dict without change of dtype."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def exact_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Put copies of the saved tensors into optimizer.state as they are, after torch's own loading.

    torch casts to each parameter's dtype, which would round the float32 factors of a bfloat16
    model and turn integer counters into floats.
    """
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for index, parameter in zip(saved["params"], group["params"], strict=True):
            if index in state_dict["state"]:
                entries = state_dict["state"][index]
                optimizer.state[parameter] = {
                    key: _copy(value, parameter.device) for key, value in entries.items()
                }


def _copy(value: Any, device: torch.device) -> Any:
    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else value
