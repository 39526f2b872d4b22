"""Which parameters form Kronecker blocks, and the momentum rule that trains every parameter."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optim.linalg import all_finite, factor_dtype, lerp_if_


@dataclass(frozen=True, eq=False)
class Block:
    """One nn.Linear trained as a whole: W_bar = [W, b], [out, in+1], the bias last.

    Without a trained bias (absent, frozen or shared) W_bar is W and the input gets no 1.
    """

    name: str
    module: nn.Linear
    weight: Tensor
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W_bar, (out, in+1) or (out, in)."""
        out, size = self.weight.shape
        return out, size + (self.bias is not None)


def find_blocks(model: nn.Module) -> list[Block]:
    """Every nn.Linear of the model whose trainable weight no other module uses.

    Only nn.Linear itself: a subclass or a parametrised layer may compute something else.
    """
    owners = _owners(model)
    blocks = []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or not module.weight.requires_grad:
            continue
        bias: Tensor | None = module.bias
        if bias is not None and (not bias.requires_grad or len(owners[bias]) > 1):
            bias = None
        if len(owners[module.weight]) == 1:
            blocks.append(Block(name, module, module.weight, bias))
    return blocks


def plain_reasons(model: nn.Module, blocks: Iterable[Block]) -> dict[Tensor, str]:
    """The trainable parameters outside all blocks, each with the reason why."""
    inside = {p for block in blocks for p in (block.weight, block.bias)}
    reasons = {}
    for parameter, names in _owners(model).items():
        if parameter in inside or not parameter.requires_grad:
            continue
        module = model.get_submodule(names[0].rpartition(".")[0])
        if len(names) > 1:
            reasons[parameter] = f"shared as {', '.join(names)}"
        elif type(module) is nn.Linear:
            reasons[parameter] = "the weight beside it is frozen or shared"
        else:
            reasons[parameter] = f"no block for {type(module).__name__}"
    return reasons


def _owners(model: nn.Module) -> dict[Tensor, list[str]]:
    """Each parameter with the names of all its places in the model."""
    owners: dict[Tensor, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(parameter, []).append(f"{prefix}.{name}" if prefix else name)
    return owners


def live_blocks(blocks: Iterable[Block]) -> list[Block]:
    """The blocks that have a gradient now; the others sit this step out, as usual in PyTorch.

    Raises: ValueError for a block in which only one of weight and bias has a gradient.
    """
    live = []
    for block in blocks:
        grads = [p.grad is not None for p in (block.weight, block.bias) if p is not None]
        if any(grads) and not all(grads):
            raise ValueError(
                f"layer '{block.name}': only one of weight and bias has a gradient; freeze "
                "parameters (requires_grad_(False)) before the optimizer is built"
            )
        if all(grads):
            live.append(block)
    return live


def add_gradient_(M: Tensor, block: Block, group: dict[str, Any]) -> Tensor:
    """M <- momentum M + (1 - momentum) (∇ + weight_decay W_bar), M [out, in+1].

    A gradient that is not finite leaves M as it was.

    Returns: whether the gradient was finite, 0-d bool tensor.
    """
    size = block.weight.shape[1]
    parts = [(block.weight, M[:, :size])]
    if block.bias is not None:
        parts.append((block.bias, M[:, size]))
    flags = [all_finite(p.grad) for p, _ in parts if p.grad is not None]
    finite = torch.stack(flags).all()
    for parameter, part in parts:
        _average_gradient_(part, parameter, finite, group)
    return finite


def move_(block: Block, P: Tensor, lr: float, ok: Tensor) -> None:
    """W_bar <- W_bar - lr P where ok and P [out, in+1] is finite, else nothing; spoils P."""
    ok = ok & all_finite(P)
    P.nan_to_num_(0.0, 0.0, 0.0).mul_(ok)
    size = block.weight.shape[1]
    block.weight.add_(P[:, :size], alpha=-lr)
    if block.bias is not None:
        block.bias.add_(P[:, size], alpha=-lr)


def pre_activation_mean(block: Block, x: Tensor) -> Tensor:
    """W_bar x̄ [out], the mean pre-activation (up to a frozen bias) for the mean input [in+1]."""
    size = block.weight.shape[1]
    z = block.weight.to(x.dtype) @ x[:size]
    return z if block.bias is None else z + block.bias.to(x.dtype)


def plain_step_(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """θ <- θ - lr M with M <- momentum M + (1 - momentum) (∇ + weight_decay θ).

    A gradient that is not finite is counted and changes nothing.
    """
    if not state:
        state["momentum"] = torch.zeros_like(parameter, dtype=factor_dtype(parameter))
        state["nonfinite"] = torch.zeros((), dtype=torch.int64, device=parameter.device)
    if parameter.grad is None or parameter.grad.is_sparse:
        raise ValueError("sparse gradients are not supported; use sparse=False in the embedding")
    finite = all_finite(parameter.grad)
    _average_gradient_(state["momentum"], parameter, finite, group)
    state["nonfinite"] += ~finite
    parameter.add_(state["momentum"] * finite, alpha=-group["lr"])


def plain_steps_(optimizer: torch.optim.Optimizer, blocks: Iterable[Block]) -> None:
    """The plain rule for every parameter of the optimizer that has a gradient and no block."""
    inside = {p for block in blocks for p in (block.weight, block.bias)}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in inside and parameter.grad is not None:
                plain_step_(parameter, optimizer.state[parameter], group)


def _average_gradient_(M: Tensor, parameter: Tensor, ok: Tensor, group: dict[str, Any]) -> None:
    assert parameter.grad is not None
    gradient = parameter.grad.to(M.dtype)
    if group["weight_decay"]:
        gradient = torch.add(gradient, parameter, alpha=group["weight_decay"])
    # nan_to_num and a weight of zero, not torch.where: six times faster on a CPU
    lerp_if_(M, gradient.nan_to_num(0.0, 0.0, 0.0), 1 - group["momentum"], ok)
