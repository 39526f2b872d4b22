"""Checks of a model, a loss and a batch; every error names its cause."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from .copies import called

Loss = Callable[[Tensor, Tensor], Tensor]

# a mean over examples may differ from the mean of its parts by rounding alone
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def check_batch(inputs: Tensor, targets: Tensor) -> None:
    """Raise ValueError for an empty batch, unequal lengths or non-finite data."""
    if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
        kinds = f"{type(inputs).__name__} and {type(targets).__name__}"
        raise ValueError(
            f"inputs and targets must be tensors with one row per example, not {kinds}"
        )
    if inputs.ndim == 0 or len(inputs) == 0:
        raise ValueError(f"the batch is empty: inputs have shape {tuple(inputs.shape)}")
    if targets.ndim == 0 or len(targets) != len(inputs):
        raise ValueError(
            f"{len(inputs)} inputs but targets of shape {tuple(targets.shape)}: "
            f"both need one row per example"
        )
    for name, tensor in {"inputs": inputs, "targets": targets}.items():
        bad = ~torch.isfinite(tensor)
        if bad.any():
            first = int(bad.reshape(len(bad), -1).any(1).nonzero()[0])
            raise ValueError(f"{name} hold NaN or Inf, first in example {first}")


def check_parameters(model: nn.Module) -> None:
    """Raise ValueError for a parameter that holds NaN or Inf, or if none can be trained."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"parameter '{name}' holds NaN or Inf")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameter (requires_grad is False throughout)")


def check_hooks(model: nn.Module) -> None:
    """Raise ValueError for a module whose weight is made by a hook, which the copy drops."""
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            kind = type(hook).__name__
            if hasattr(hook, "compute_weight"):
                raise ValueError(
                    f"{called(name)} gets its weight from a {kind} hook, which a hook-free copy "
                    f"loses; use torch.nn.utils.parametrizations instead"
                )
            if isinstance(hook, BasePruningMethod):
                raise ValueError(
                    f"{called(name)} gets its '{hook._tensor_name}' from a {kind} hook, which a "
                    f"hook-free copy loses; make the pruning permanent with "
                    f"torch.nn.utils.prune.remove(layer, '{hook._tensor_name}')"
                )


def layer_outputs(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """{leaf module: its first output tensor} of one forward pass, in calling order."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if not any(module.children()):

            def record(_m: nn.Module, _i: object, output: object, name: str = name) -> None:
                if isinstance(output, Tensor):
                    seen.setdefault(name, output.detach().clone())

            handles.append(module.register_forward_hook(record))
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def check_forward(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> None:
    """Raise ValueError for an output or loss of a wrong kind or not finite, or a random model."""
    with torch.no_grad():
        outputs, again = model(inputs), model(inputs)
        if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != len(inputs):
            seen = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                f"the model must return one tensor with a row per example "
                f"({len(inputs)} rows); it returned {seen}"
            )
        if not torch.equal(outputs.nan_to_num(), again.nan_to_num()):
            first, second = layer_outputs(model, inputs), layer_outputs(model, inputs)
            culprits = [n for n in first if n in second and not torch.equal(first[n], second[n])]
            where = f"layer '{culprits[0]}'" if culprits else "code outside its layers"
            raise ValueError(
                f"the model is not deterministic in eval mode: two passes over the same inputs "
                f"differ by up to {(outputs - again).abs().max():.3g}, first at {where}; "
                f"remove the randomness before measuring"
            )
        if not torch.isfinite(outputs).all():
            bad = [n for n, t in layer_outputs(model, inputs).items() if not t.isfinite().all()]
            where = f"layer '{bad[0]}'" if bad else "the model"
            raise ValueError(f"the outputs hold NaN or Inf, first at {where}")
        value = loss(outputs, targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            seen = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"the loss must be one number, the mean over the batch; it returned {seen} "
                f"(reduction='none'?)"
            )
        if not torch.isfinite(value):
            raise ValueError(f"the loss is {value.item()} though the outputs are finite")


def check_mean(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless loss(batch) is the mean of the examples' losses.

    Compared on the batch, its first example and its halves; a batch of one is doubled.
    """
    if len(inputs) == 1:
        inputs, targets = torch.cat([inputs, inputs]), torch.cat([targets, targets])
    n = len(inputs)

    def total(rows: slice) -> Tensor:
        x, t = inputs[rows], targets[rows]
        return len(x) * loss(model(x), t).detach()

    with torch.no_grad():
        whole = total(slice(None))
        splits = {(cut, total(slice(cut)) + total(slice(cut, None))) for cut in {1, (n + 1) // 2}}
    tolerance = TOLERANCE.get(whole.dtype, 1e-2)
    for cut, parts in splits:
        if (parts - whole).abs() > tolerance * (1 + whole.abs()):
            raise ValueError(_mean_message(whole, parts, cut, n, loss))


def _mean_message(whole: Tensor, parts: Tensor, cut: int, n: int, loss: Loss) -> str:
    name = type(loss).__name__ if isinstance(loss, nn.Module) else getattr(loss, "__name__", "loss")
    # for a sum, n·loss(batch) = n Σ and the parts give cut·Σ_1 + (n - cut)·Σ_2
    reduction = getattr(loss, "reduction", None)
    hint = (
        "it has reduction='sum': use 'mean', or divide by the number of examples"
        if reduction == "sum"
        else "usual causes: a sum over the batch, class weights or ignore_index (a weighted mean), "
        "or a model that mixes examples (batch statistics, attention across the batch)"
    )
    return (
        f"the loss {name} is not a mean over examples: on {n} examples it is "
        f"{whole.item() / n:.6g}, but the first {cut} and the other {n - cut} average to "
        f"{parts.item() / n:.6g}; {hint}"
    )
