"""Repeated evaluation of the user's closure without side effects, and full precision inside."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..linalg.products import CPU, allowed

RandomState = dict[torch.device, Tensor]
FULL = ("ieee", "none")  # settings of PyTorch that leave float32 as it is
AGAIN = (
    "This was a further call of the closure in one step, in which parameters "
    "get no gradients: what the closure does with .grad must allow for None, and a penalty of "
    "parameters alone is to be added to the loss before backward. The layers must be twice "
    "differentiable."
)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside, no autocast, no TF32 and no bfloat16 in products of float32.

    Factors and steps are made in their own precision.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            with _full_precision_on_cpu():
                yield
            return
        products = torch.get_float32_matmul_precision()
        convolutions = torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(products)
            torch.backends.cudnn.allow_tf32 = convolutions


def _full_precision_on_cpu() -> ExitStack:
    stack = ExitStack()
    for operations in (CPU.matmul, CPU.conv):
        if operations.fp32_precision not in FULL:
            stack.enter_context(allowed(operations, "ieee"))
    return stack


@contextmanager
def parameters_at_rest(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter requires a gradient: a backward skips the products for them."""
    moving = [p for p in model.parameters() if p.requires_grad]
    for parameter in moving:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in moving:
            parameter.requires_grad_(True)


def random_state(model: nn.Module) -> RandomState:
    """State of PyTorch's generators: the CPU's and those of the CUDA devices the model is on."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    for device in {p.device for p in model.parameters() if p.device.type == "cuda"}:
        states[device] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: RandomState) -> None:
    """Put the generators back into a state that `random_state` read."""
    for device, state in states.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


@contextmanager
def replayed(model: nn.Module, states: RandomState) -> Iterator[None]:
    """Inside, random numbers repeat from `states` (same dropout masks); after, as before."""
    now = random_state(model)
    set_random_state(states)
    try:
        yield
    finally:
        set_random_state(now)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Leave every .grad and every buffer of the model as found; inside, all .grad are None."""
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for parameter, _ in grads:  # zero_grad(set_to_none=False) would overwrite them
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer.copy_(value))


def run(closure: Callable[[], Tensor]) -> Tensor:
    """The closure's result, with gradients enabled around it."""
    with torch.enable_grad():
        return closure()


def cut_output(_: nn.Module, __: Any, output: Any) -> Tensor | None:
    """A forward hook of the model: the loss alone is wanted, backward ends at the output."""
    if torch.is_grad_enabled() and isinstance(output, Tensor):
        return cut(output, lambda _: None)
    return None


def cut(output: Tensor, arrived: Callable[[Tensor], None]) -> Tensor:
    """The output as a leaf of its own, where backward ends and `arrived` is told its gradient."""
    leaf = output.detach().requires_grad_()
    leaf.register_hook(arrived)
    return leaf.clone()  # what follows may work in place, which a leaf refuses


def run_again(
    model: nn.Module,
    closure: Callable[[], Tensor],
    start: RandomState,
    hook: Callable[[nn.Module, tuple[Any, ...], Any], Tensor | None],
) -> Tensor:
    """The closure's loss, with a forward hook on the model, on the same dropout masks.

    .grad and buffers end as they were.
    """
    handle = model.register_forward_hook(hook)
    try:
        with (
            untouched(model),
            replayed(model, start),
            sdpa_kernel(SDPBackend.MATH),  # the fused ones have no second derivative
        ):
            return run(closure).detach()
    except Exception as error:
        error.add_note(AGAIN)
        raise
    finally:
        handle.remove()
