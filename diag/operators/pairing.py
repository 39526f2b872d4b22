"""A truth and an approximation together: whether they fit, and what is known of the two."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast
from weakref import ref

from torch import Tensor

from .dtypes import convert, differs, entries_of, versions
from .solving import keep
from .structures import Operator

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def of_one_size_and_dtype(metric: F) -> F:
    """The metric, asked of an approximation that fits its truth: see `fitted`.

    A gradient is converted like the approximation.
    """
    signature = inspect.signature(metric)

    @wraps(metric)
    def asked(*given: Any, **keywords: Any) -> Any:
        try:
            bound = signature.bind(*given, **keywords)
        except TypeError as error:
            raise TypeError(f"{metric.__name__}() {error}") from None
        truth, named = bound.arguments["truth"], bound.arguments
        if named.get("approximation") is not None:
            named["approximation"] = fitted(metric.__name__, truth, named["approximation"])
        if isinstance(named.get("gradient"), Tensor) and (own := entries_of(truth)) is not None:
            named["gradient"] = named["gradient"].to(own)
        return metric(*bound.args, **bound.kwargs)

    return cast(F, asked)


def fitted(asked_by: str, truth: Operator, approximation: Operator) -> Operator:
    """The approximation in the dtype and on the device of the truth, once for each pair.

    Raises: ValueError naming both where their shapes differ.
    """
    if tuple(truth.shape) != tuple(approximation.shape):
        first, second = (
            f"a {type(each).__name__} {_size(each)}" for each in (truth, approximation)
        )
        raise ValueError(
            f"{asked_by} compares two operators of one size, not {first} with {second}: give it a "
            f"truth and an approximation of the same block"
        )
    own = entries_of(truth)
    if own is None or not differs(approximation, own):
        return approximation
    return keep_pair(truth, "converted", approximation, lambda: convert(approximation, own))


def _size(operator: Operator) -> str:
    return f"[{', '.join(map(str, operator.shape))}]"


def keep_pair(truth: Operator, key: str, approximation: Operator, compute: Callable[[], T]) -> T:
    """compute(), once per truth, key and approximation, kept while both live.

    Only for an approximation that is a structure of diag, and until one of its tensors is changed;
    a plain tensor or an optimizer's live view may be another matrix at the next look.
    """
    state = versions(approximation)
    if state is None:
        return compute()
    known = keep(truth, key, dict)
    owner, then, found = known.get(id(approximation), (None, None, None))
    # by identity, for == of two tensors is no yes or no; an id may come again once its owner died
    if owner is None or owner() is not approximation or then != state:
        for gone in [name for name, (owner, *_) in known.items() if owner() is None]:
            del known[gone]
        found = compute()
        known[id(approximation)] = (ref(approximation), state, found)
    return cast(T, found)
