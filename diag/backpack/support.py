"""Checks, before BackPACK runs, that it computes a model and loss correctly.

BackPACK looks modules up by their class: what it does not know it refuses in the middle of a
backward pass, and some settings it ignores, computing another matrix than asked for. Both are
refused here by name, with the remedy; docs/backpack.md has the table.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from backpack import extend
from backpack.utils.module_classification import is_no_op
from torch import Tensor, fx, nn

from ..problem import Problem

INSTEAD = "use backend='torch.func'"

Extension = Any  # a BackpropExtension; BackPACK has no types


class UnsupportedError(ValueError):
    """BackPACK cannot compute what was asked for, or would compute something else."""


def known_classes(extension: Extension) -> dict[type[nn.Module], Any]:
    """BackPACK's own table of an extension: {module class: how it is handled}."""
    found: dict[type[nn.Module], Any] = extension._BackpropExtension__module_extensions
    return found


def chain(model: nn.Module) -> nn.Module:
    """Model as a chain of modules that BackPACK can follow, with the same parameters.

    nn.Sequential (of nn.Sequential) is one already; any other forward is taken apart by BackPACK's
    converter (torch.fx): it knows +, flatten, permute, scaling by a number and indexing of tuples.

    Raises: UnsupportedError naming the first operation outside a module.
    """
    if _sequential(model, set()):
        return model
    check_in_place(dict(model.named_modules()))  # the converter would switch it off in silence
    try:
        converted = extend(model, use_converter=True).eval()
    except Exception as error:  # tracing runs the model's own code on stand-ins: anything may fail
        raise UnsupportedError(
            f"BackPACK cannot take the forward of {type(model).__name__} apart "
            f"({str(error).partition(chr(10))[0]}); write it as nn.Sequential, each module used "
            f"once, or {INSTEAD}"
        ) from error
    for node in converted.graph.nodes:
        if node.op not in ("call_module", "placeholder", "output"):
            what = getattr(node.target, "__name__", str(node.target))
            raise UnsupportedError(
                f"the forward of {type(model).__name__} calls '{what}' outside a module, where "
                f"BackPACK cannot see it; make it a module (nn.Tanh() for torch.tanh, nn.Flatten() "
                f"for view) or {INSTEAD}"
            )
    return converted


def _sequential(model: nn.Module, seen: set[int]) -> bool:
    """Whether the model is one module, or nn.Sequential (no subclass) of such, each used once."""
    if id(model) in seen:
        return False
    seen.add(id(model))
    if type(model) is nn.Sequential:
        return all(_sequential(child, seen) for child in model)
    return not any(True for _ in model.children())


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that a chain calls, {name: module}."""
    if isinstance(model, fx.GraphModule):
        names = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
        named = {name: model.get_submodule(name) for name in names}
    else:
        named = dict(model.named_modules())
    return {name: module for name, module in named.items() if not is_no_op(module)}


def check_modules(modules: dict[str, nn.Module], extension: Extension) -> None:
    """Raise UnsupportedError naming the first module the extension lacks or gets wrong."""
    check_in_place(modules)
    for name, module in modules.items():
        if type(module) not in known_classes(extension):
            raise UnsupportedError(
                f"BackPACK's {type(extension).__name__} does not support {_called(name, module)}; "
                f"{_siblings(module, extension)}{INSTEAD}"
            )
        if wrong := _setting(module):
            raise UnsupportedError(
                f"BackPACK's {type(extension).__name__} gets {_called(name, module)} wrong: "
                f"{wrong}, or {INSTEAD}"
            )


def check_in_place(modules: dict[str, nn.Module]) -> None:
    """Raise UnsupportedError naming a module that overwrites its input: the hooks forbid that."""
    for name, module in modules.items():
        dropout = isinstance(module, nn.modules.dropout._DropoutNd)  # untouched in eval mode
        if getattr(module, "inplace", False) and not dropout:
            raise UnsupportedError(
                f"BackPACK does not support {_called(name, module)} working in place; "
                f"set inplace=False, or {INSTEAD}"
            )


def _setting(module: nn.Module) -> str:
    """Setting that BackPACK ignores, and the remedy; empty if there is none."""
    mode, padding = getattr(module, "padding_mode", "zeros"), getattr(module, "padding", 0)
    if mode != "zeros":
        return f"it takes padding_mode='{mode}' for zeros; use padding_mode='zeros'"
    if isinstance(padding, str):
        return f"it does not know padding='{padding}'; give it as a number"
    if getattr(module, "divisor_override", None) is not None:
        return f"it ignores divisor_override={module.divisor_override}; use divisor_override=None"
    return ""


def _called(name: str, module: nn.Module) -> str:
    where = f"layer '{name}'" if name else "the model itself"
    return f"{where} ({type(module).__name__})"


def _siblings(module: nn.Module, extension: Extension) -> str:
    """Remedy 'replace it by ..., or ' with known classes of the module's kind."""
    kind = type(module).__module__
    if not kind.startswith("torch.nn."):
        return "replace it by modules of torch.nn it knows, or "
    known = [c.__name__ for c in known_classes(extension) if c.__module__ == kind]
    return (
        f"replace it by {', '.join(f'nn.{name}' for name in sorted(known))}, or " if known else ""
    )


def owners(model: nn.Module, names: Sequence[str], extension: Extension) -> dict[str, nn.Module]:
    """Modules that hold the named parameters, all known to the extension, {name: module}.

    Raises: UnsupportedError for an unknown module or a parameter that two modules share.
    """
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    for name in names:
        others = [n for n in holders[id(model.get_parameter(name))] if n != name]
        if others:
            raise UnsupportedError(
                f"BackPACK counts one use of a parameter only, but '{name}' is also "
                f"'{others[0]}'; {INSTEAD}"
            )
    found = {n.rpartition(".")[0]: model.get_submodule(n.rpartition(".")[0]) for n in names}
    check_modules(found, extension)
    return found


def check_called_once(problem: Problem, names: Iterable[str]) -> None:
    """Raise UnsupportedError unless one forward pass calls each of the named modules once."""
    calls = dict.fromkeys(names, 0)
    handles = []
    for name in calls:

        def count(_module: nn.Module, _args: Any, name: str = name) -> None:
            calls[name] += 1

        handles.append(problem.model.get_submodule(name).register_forward_pre_hook(count))
    try:
        with torch.no_grad():
            problem.model(problem.inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name, times in calls.items():
        if times != 1:
            raise UnsupportedError(
                f"layer '{name}' is called {times} times in one pass; BackPACK counts one call "
                f"only; {INSTEAD}"
            )


def check_loss(loss: Any, extension: Extension, targets: Tensor) -> None:
    """Raise UnsupportedError for a loss whose output Hessian the extension lacks or gets wrong."""
    known = [c.__name__ for c in known_classes(extension) if issubclass(c, nn.modules.loss._Loss)]
    losses = ", ".join(f"nn.{name}()" for name in sorted(known))
    if not isinstance(loss, nn.Module):
        raise UnsupportedError(
            f"backend='backpack' needs the loss as a module ({losses}), not a function; {INSTEAD}"
        )
    if type(loss) not in known_classes(extension):
        raise UnsupportedError(
            f"BackPACK's {type(extension).__name__} does not support the loss "
            f"{type(loss).__name__}; replace it by {losses}, or {INSTEAD}"
        )
    if isinstance(loss, nn.CrossEntropyLoss) and targets.is_floating_point():
        sums = targets.sum(1)
        if not torch.allclose(sums, torch.ones_like(sums)):
            raise UnsupportedError(
                f"BackPACK takes the target probabilities of CrossEntropyLoss to sum to 1, but "
                f"they sum to {sums.min():.4g} to {sums.max():.4g}; normalise them, or {INSTEAD}"
            )
