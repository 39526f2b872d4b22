"""Layer inputs (patches) a [groups, m, T, in] and gradients g [groups, m, T, out] by position.

T positions per example: those of [batch, ..., in] for a Linear layer, places of the output else.
"""

from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, unfold
from torch.nn.grad import conv2d_weight

from ..blocks.blocks import Block

PIECE = 2**24  # entries of the patches unfolded at once


def padded(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The input with the module's own padding around it, whatever its mode."""
    around = module._reversed_padding_repeated_twice
    if not any(around):
        return x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return pad(x, around, mode=mode)


def inputs(block: Block, x: Tensor) -> Tensor:
    """What the layer's weights are multiplied with, a [groups, m, T, in], without the 1."""
    module = block.module
    if isinstance(module, nn.Linear):
        return x.reshape(1, len(x), -1, x.shape[-1])
    columns = unfold(
        padded(module, x), module.kernel_size, dilation=module.dilation, stride=module.stride
    )
    return columns.unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2)


def gradients(block: Block, g: Tensor) -> Tensor:
    """Gradients w.r.t. the layer's output as [groups, m, T, out]."""
    if isinstance(block.module, nn.Linear):
        return g.reshape(1, len(g), -1, g.shape[-1])
    return g.flatten(2).unflatten(1, (block.groups, -1)).permute(1, 0, 3, 2)


def pieces(block: Block, x: Tensor) -> list[Tensor]:
    """The batch cut so that the patches of one piece stay small."""
    if isinstance(block.module, nn.Linear):
        return [x]
    return list(x.split(max(1, PIECE // max(1, len(x[0, 0].flatten()) * block.inputs))))


def row_mean(block: Block, x: Tensor) -> Tensor:
    """Mean over examples and positions of [a; 1] (or of a), [groups, in+1]."""
    if isinstance(block.module, nn.Linear):
        mean = x.reshape(-1, x.shape[-1]).mean(0)[None]
    else:
        ones = x.new_ones(len(x), block.groups, 1, 1)
        mean = _weighted_patches(block, x, ones) / (len(x) * prod(_output_size(block, x)))
    return mean if block.bias is None else torch.cat([mean, mean.new_ones(len(mean), 1)], 1)


def patch_action(block: Block, x: Tensor, s: Tensor) -> Tensor:
    """Σ_n Σ_t ã (ã · s) [groups, in+1] for s of that shape: E[ã ãᵀ] s times m, never formed.

    A convolution with s as its filter and the gradient of one: O(m T in) (arXiv:2102.06737).
    """
    module, size = block.module, block.inputs
    assert isinstance(module, nn.Conv2d)
    bias = None if block.bias is None else s[:, size].contiguous()
    kernel = s[:, :size].reshape(block.groups, *block.weight.shape[1:])
    q = conv2d(
        padded(module, x), kernel, bias, module.stride, 0, module.dilation, groups=block.groups
    )
    acted = _weighted_patches(block, x, q)
    return acted if bias is None else torch.cat([acted, q.sum((0, 2, 3))[:, None]], 1)


def _weighted_patches(block: Block, x: Tensor, q: Tensor) -> Tensor:
    """Σ_n Σ_t q_nt a_nt [groups, in], q [m, groups, H', W'] (or 1 x 1: the same everywhere)."""
    module = block.module
    assert isinstance(module, nn.Conv2d)
    shape = (block.groups, *block.weight.shape[1:])
    if q.shape[2:] == (1, 1):
        q = q.expand(*q.shape[:2], *_output_size(block, x)).contiguous()
    return conv2d_weight(
        padded(module, x), shape, q, module.stride, 0, module.dilation, groups=block.groups
    ).reshape(block.groups, -1)


def _output_size(block: Block, x: Tensor) -> tuple[int, int]:
    module = block.module
    assert isinstance(module, nn.Conv2d)
    left, right, top, bottom = module._reversed_padding_repeated_twice
    sizes = (x.shape[2] + top + bottom, x.shape[3] + left + right)
    spans = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    height, width = (
        (n - span) // stride + 1
        for n, span, stride in zip(sizes, spans, module.stride, strict=True)
    )
    return height, width
