"""Hook-free copies of models, and notes on what a copy leaves out."""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def hook_free_copy(model: nn.Module) -> nn.Module:
    """Deep copy without hooks and .grad.

    Raises: ValueError naming the layer and the attribute that cannot be copied.
    """
    try:
        with torch.no_grad():
            return copy.deepcopy(model, _without_hooks(model))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind: copying runs the code of whatever a module holds
        raise ValueError(_uncopied(model, error)) from error


def _without_hooks(model: nn.Module) -> dict[int, Any]:
    """The memo for deepcopy that replaces every module's hooks by none."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name in HOOKS:
            if (hooks := getattr(module, name, None)) is not None:
                memo[id(hooks)] = OrderedDict()
    return memo


def _uncopied(model: nn.Module, error: Exception) -> str:
    reason = f"({first_line(error)})"
    for name, module in reversed(list(model.named_modules())):  # what a module holds before itself
        for attribute, value in _held(module):
            try:
                copy.deepcopy(value, _without_hooks(model))
            except Exception:
                return (
                    f"'{attribute}' of {called(name)} ({type(module).__name__}) cannot be copied "
                    f"{reason}: set it to None before measuring, a tensor to its .detach()"
                )
    return f"the model ({type(model).__name__}) cannot be copied {reason}"


def _held(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes and buffers of a module, without its submodules."""
    for attribute, value in vars(module).items():
        if attribute == "_buffers":
            yield from value.items()
        elif attribute != "_modules" and attribute not in HOOKS:
            yield attribute, value


def called(name: str) -> str:
    """The module's name in messages."""
    return f"layer '{name}'" if name else "the module itself"


def first_line(error: Exception) -> str:
    """The error's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def left_out(model: nn.Module) -> tuple[str, bool]:
    """A note on the forward hooks that the copy lacks ("" for none), and whether to warn.

    Warned is of Python functions, which may change the outputs; other hooks (of optimizers) and
    BackPACK's only watch.
    """
    hooks = [
        (called(name), hook)
        for name, module in model.named_modules()
        for hook in [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if hook is not _copied
    ]
    if not hooks:
        return "", False
    owners = list(dict.fromkeys(owner for owner, _ in hooks))
    more = f" and {len(owners) - 3} more" if len(owners) > 3 else ""
    note = (
        f"the forward hooks of {', '.join(owners[:3])}{more} are left out: what is measured is the "
        f"model without them; make one that changes what the model returns a module of the model"
    )
    functions = [hook for _, hook in hooks if isinstance(hook, FunctionType | MethodType)]
    return note, not all(hook.__module__.partition(".")[0] == "backpack" for hook in functions)


def work_on_copies(model: nn.Module, inputs: Tensor) -> None:
    """Make a model that writes into its input work on a copy of it, found by one pass."""
    first = inputs[:1].clone()
    with torch.no_grad():
        model(first)
    if first._version:
        model.register_forward_pre_hook(_copied)


def _copied(_model: nn.Module, args: tuple) -> tuple:
    return (args[0].clone(), *args[1:])
