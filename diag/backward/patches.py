"""Input patches and outputs by position of Linear and convolutional layers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold


def _linear(_module: nn.Linear, x: Tensor) -> Tensor:
    return x.reshape(len(x), 1, -1, x.shape[-1])


def _conv1d(module: nn.Conv1d, x: Tensor) -> Tensor:
    sizes = module.kernel_size, module.stride, module.dilation
    return _unfolded(module, x[:, :, None], *((1, *size) for size in sizes))


def _conv2d(module: nn.Conv2d, x: Tensor) -> Tensor:
    return _unfolded(module, x, module.kernel_size, module.stride, module.dilation)


def _unfolded(
    module: nn.Conv1d | nn.Conv2d,
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    around = module._reversed_padding_repeated_twice
    if any(around):  # circular and reflected padding know no dimension of height 1
        flat = x[:, :, 0] if isinstance(module, nn.Conv1d) else x
        padded = pad(flat, around, mode=mode)
        x = padded[:, :, None] if isinstance(module, nn.Conv1d) else padded
    columns = unfold(x, kernel, dilation=dilation, stride=stride)  # [N, in·kernel, T]
    return columns.unflatten(1, (module.groups, -1)).mT


PATCHES: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv1d,
    nn.Conv2d: _conv2d,
}


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """Input patch of each position with 1 appended, [N, groups, T, in+1], in the weight's order."""
    a = PATCHES[type(module)](module, x)
    return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)


def by_position(module: nn.Module, z: Tensor, lead: int = 0) -> Tensor:
    """Reshape [*lead, N, *z], z of the layer's output shape, to [*lead, N, T, out]."""
    if isinstance(module, nn.Linear):
        return z.reshape(*z.shape[: lead + 1], -1, z.shape[-1])
    return z.flatten(lead + 2).mT  # channels come before positions


def per_group(b: Tensor, groups: int) -> Tensor:
    """Reshape [..., T, out] to [..., groups, T, out / groups]."""
    return b.unflatten(-1, (groups, -1)).movedim(-2, -3)
