"""Interface of exact curvatures stored as a mean of per-example terms."""

from abc import ABC, abstractmethod

from torch import Tensor

from ..operators import Operator


class PerExampleTerms(ABC):
    """Operator C = (1/N) Σ_n T_n with symmetric terms T_n [d, d] that are never formed.

    Norms, errors, sampling noise and intervals follow from the inner products below.
    """

    kept: dict  # results of earlier questions

    @property
    @abstractmethod
    def n(self) -> int:
        """Number of examples N."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(d, d)."""

    @property
    @abstractmethod
    def gram(self) -> Tensor:
        """<T_n, T_m>, [N, N]."""

    @abstractmethod
    def inners(self, other: Operator) -> Tensor:
        """<T_n, other> for every example, [N]."""

    @abstractmethod
    def quadratic(self, u: Tensor, v: Tensor) -> Tensor:
        """u·T_n v for every example, [N], for u and v [d]."""

    @abstractmethod
    def __matmul__(self, v: Tensor, /) -> Tensor: ...


def mean_inner(first: PerExampleTerms, second: Operator) -> Tensor:
    """<C, second> as the mean over examples: the rule of `inner` for per-example terms."""
    return first.gram.mean() if first is second else first.inners(second).mean()
