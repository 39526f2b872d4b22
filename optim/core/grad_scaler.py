"""Mixed precision with a GradScaler: taking its scale off gradients and captured statistics."""

import torch
from torch.optim import Optimizer

NEEDS_SCALER = (
    "scaler.unscale_(optimizer) has taken the scale off .grad, but the gradients captured at the "
    "layers still carry it; tell the optimizer before training: optimizer.scaler = scaler"
)


def take_scale(optimizer: Optimizer, *, needed: bool) -> float | None:
    """The scale that captured gradients carry; .grad is rid of it. None: overflow, do not step.

    GradScaler.step leaves `found_inf` and, unless unscale_ was called before, `grad_scale` on an
    optimizer that asks for them; after an unscale_ optimizer.scaler, set by the user, tells it.
    Reading `found_inf` waits for the device, as GradScaler does.

    needed: whether the method uses captured gradients.
    Raises: ValueError where it is needed, unscale_ was called and the scaler is not known.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is None:
        return 1.0
    if bool(found_inf):
        return None
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None and not needed:
        return 1.0
    if scale is None:
        scaler = getattr(optimizer, "scaler", None)
        if scaler is None:
            _forget(optimizer)
            raise ValueError(NEEDS_SCALER)
        return scaler.get_scale()
    grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    torch._foreach_mul_(grads, 1.0 / float(scale))
    return float(scale)


def refuse_scaler(optimizer: Optimizer) -> None:
    """Raise ValueError if a GradScaler is stepping this optimizer, which needs a closure."""
    if getattr(optimizer, "found_inf", None) is not None:
        _forget(optimizer)
        raise ValueError(
            f"{type(optimizer).__name__} evaluates the loss twice a step, at another scale than "
            "GradScaler's; train in bfloat16 (torch.autocast with dtype=torch.bfloat16), which "
            "needs no scaler, or use a one-pass method such as KFAC"
        )


def _forget(optimizer: Optimizer) -> None:
    """Remove the attributes that GradScaler set and would leave after an error."""
    for name in ("found_inf", "grad_scale"):
        optimizer.__dict__.pop(name, None)
