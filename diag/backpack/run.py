"""One run of BackPACK, on a deep copy: its hooks never reach the caller's model."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from backpack import backpack, extend
from backpack.context import CTX
from torch import Tensor, nn

from ..problem import Block, Problem
from ..problem.copies import hook_free_copy
from . import support
from .guard import check_agreement
from .support import INSTEAD, Extension, UnsupportedError

# PyTorch's, about every first layer BackPACK hooks (inputs need no gradient); BackPACK's, about
# what a converted forward still does outside modules, which is refused by name instead
SILENCED = ("Full backward hook is firing", "Encountered node that may break second-order")

# what BackPACK and autograd raise for settings they do not handle
FAILURES = (RuntimeError, ValueError, AttributeError, AssertionError, TypeError)

Quantities = dict[str, dict[str, Tensor]]


def run(
    problem: Problem,
    block: Block,
    extensions: Sequence[Extension],
    generator: torch.Generator | None = None,
) -> Quantities:
    """Quantities {savefield: {parameter: tensor}} of a block after one backward pass.

    extensions: all of first or all of second order. generator: for labels, which BackPACK draws
    from the global random state; that is put back.

    Raises: UnsupportedError naming what BackPACK does not support and the remedy, or for a
    gradient that is not the problem's.
    """
    with _isolated(problem):
        model = _bare(problem.model)
        parameters = {name: model.get_parameter(name) for name in block.parameters}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in parameters)  # roots of the rest would only cost memory
        try:
            model, loss = _extended(problem, model, block, extensions)
            value = loss(model(problem.inputs.clone()), problem.targets)  # it may write into it
            if generator is not None:
                _seed(problem, generator)
            with backpack(*extensions):
                value.backward()
        except (UnsupportedError, torch.OutOfMemoryError):
            raise
        except FAILURES as error:
            raise UnsupportedError(_explained(problem, extensions, error)) from error
    _check_gradient(problem, block, parameters)
    return {e.savefield: _saved(parameters, e) for e in extensions}


def _extended(
    problem: Problem, model: nn.Module, block: Block, extensions: Sequence[Extension]
) -> tuple[nn.Module, Any]:
    """Model and loss with BackPACK's hooks, once everything in them is known to be supported."""
    second_order = extensions[0].expects_backpropagation_quantities()
    for extension in extensions if second_order else []:
        support.check_loss(problem.loss, extension, problem.targets)
    owners = [support.owners(model, block.parameters, extension) for extension in extensions]
    if not second_order:
        # autograd carries the gradients: only the block's own modules need hooks
        support.check_in_place(dict(model.named_modules()))
        support.check_called_once(problem, owners[0])
        for module in owners[0].values():
            extend(module)
        return model, problem.loss
    model = support.chain(model)
    for extension in extensions:
        support.check_modules(support.modules_of(model), extension)
    assert isinstance(problem.loss, nn.Module)  # check_loss refuses functions
    return extend(model), extend(_bare(problem.loss))


def _bare(module: nn.Module) -> nn.Module:
    """A deep copy without hooks, nor the mark by which BackPACK knows what it has hooked."""
    copy = hook_free_copy(module)
    for part in copy.modules():
        part.__dict__.pop("_backpack_extend", None)
    return copy


@contextmanager
def _isolated(problem: Problem) -> Iterator[None]:
    """Context with gradients on, BackPACK's warnings off, and the random state put back.

    The default dtype is the model's, as BackPACK makes some constants without naming one. Random
    numbers are drawn for sampled labels, and by its converter, which makes new layers.
    """
    dtype, handles = torch.get_default_dtype(), len(CTX.hook_handles)
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng([problem.inputs.get_device()] if problem.inputs.is_cuda else []),
        torch.enable_grad(),
    ):
        for message in SILENCED:
            warnings.filterwarnings("ignore", message)
        torch.set_default_dtype(next(problem.model.parameters()).dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            del CTX.hook_handles[handles:]  # it keeps every handle it ever made


def _seed(problem: Problem, generator: torch.Generator) -> None:
    """Set the global random state of the problem's device, where BackPACK draws, from generator."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    if problem.inputs.is_cuda:
        torch.cuda.default_generators[problem.inputs.get_device()].manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def _explained(problem: Problem, extensions: Sequence[Extension], error: Exception) -> str:
    names = " and ".join(type(extension).__name__ for extension in extensions)
    reason = (str(error) or type(error).__name__).partition("\n")[0]
    kinds = sorted({type(m).__name__ for m in support.modules_of(problem.model).values()})
    loss = getattr(problem.loss, "__name__", type(problem.loss).__name__)
    return (
        f"BackPACK's {names} cannot handle this problem ({reason}); modules: {', '.join(kinds)}; "
        f"loss: {loss}; {INSTEAD}"
    )


def _saved(parameters: dict[str, nn.Parameter], extension: Extension) -> dict[str, Tensor]:
    for name, parameter in parameters.items():
        if not hasattr(parameter, extension.savefield):
            raise UnsupportedError(
                f"BackPACK's {type(extension).__name__} computed nothing for parameter '{name}', "
                f"which it does not know; {INSTEAD}"
            )
    return {name: getattr(p, extension.savefield) for name, p in parameters.items()}


def _check_gradient(problem: Problem, block: Block, parameters: dict[str, nn.Parameter]) -> None:
    found = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    if len(found) < len(parameters):
        missing = next(name for name in parameters if name not in found)
        raise UnsupportedError(f"the copy BackPACK runs on does not use '{missing}'; {INSTEAD}")
    check_agreement("gradient", block, block.join(found), problem.gradient(block))
