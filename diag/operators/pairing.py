"""Pairs of a truth and an approximation: equal size and dtype, and results kept per pair."""

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
    """Decorate a metric: approximation and gradient arrive in the truth's dtype and device.

    Raises: ValueError where the shapes of truth and approximation differ.
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
    """The approximation in the dtype and on the device of the truth, converted once per pair.

    Raises: ValueError naming both where their shapes differ.
    """
    if tuple(truth.shape) != tuple(approximation.shape):
        first, second = (
            f"a {type(each).__name__} {list(each.shape)}" for each in (truth, approximation)
        )
        raise ValueError(
            f"{asked_by} compares two operators of one size, not {first} with {second}: give it a "
            f"truth and an approximation of the same block"
        )
    own = entries_of(truth)
    if own is None or not differs(approximation, own):
        return approximation
    return keep_pair(truth, "converted", approximation, lambda: convert(approximation, own))


def keep_pair(truth: Operator, key: str, approximation: Operator, compute: Callable[[], T]) -> T:
    """compute(), once per truth, key and approximation while both live.

    Computed anew once a tensor of the approximation changed, and always for what is no structure of
    diag: a plain tensor or live view may change unnoticed.
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
