"""Conjugate gradients on several damped linear systems at once, one per parameter block.

Source: Martens 2010, Deep learning via Hessian-free optimization, section 4.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core import distributed
from ...core.refresher import to_host
from ...linalg.basics import free_to_read, is_finite

# (indices of some systems, v of each in the shapes of its parameters) -> G_bb v likewise
Products = Callable[[Sequence[int], Sequence[Sequence[Tensor]]], Sequence[Sequence[Tensor]]]
# values of φ, the start's first -> whether to stop, 0-d bool
StopRule = Callable[[Sequence[Tensor]], Tensor]


@dataclass(eq=False)
class System:
    """Conjugate gradients on (G_bb + Λ) x = -g, the minimum of φ(x) = ½ xᵀ(G_bb + Λ)x + gᵀx.

    Vectors are [d], the parameters of block b concatenated.

    parameters: of the block, those with a gradient. g: the gradient, minus the right-hand side.
    damping: per parameter, numbers or 0-d tensors. x: the start, then the solution so far.
    warm: whether the start may be nonzero. D: diagonal preconditioner [d], or None.

    active: not ended yet. lost: g, a product or x was not finite. flat: ended at pᵀ(G + Λ)p <= 0.
    iterations: how many changed x. All 0-d tensors.
    phi: φ at the start and after each iteration. iterates: (x, φ) of the iterations to keep.
    """

    parameters: list[Tensor]
    g: Tensor
    damping: list[float | Tensor]
    x: Tensor
    warm: bool = False
    D: Tensor | None = None
    phi: list[Tensor] = field(default_factory=list)
    iterates: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.active = torch.ones((), dtype=torch.bool, device=self.g.device)
        self.lost, self.flat = ~is_finite(self.g.sum()), ~self.active
        self.iterations = torch.zeros((), dtype=torch.int64, device=self.g.device)
        self._flag: tuple[Tensor, torch.cuda.Event] | None = None
        self._damped = torch.empty_like(self.g)
        self._p = self.x

    @property
    def done(self) -> bool:
        """Whether the host knows that the system has ended; a late notice changes no result."""
        if free_to_read(self.active) or distributed.size() > 1:
            return not bool(self.active)
        if self._flag is not None and self._flag[1].query():
            host, self._flag = self._flag[0], None
            if not bool(host):
                return True
        if self._flag is None:
            self._flag = to_host(self.active)
        return False

    @property
    def direction(self) -> list[Tensor]:
        """Next vector to multiply with G_bb, in the shapes of the parameters: x, then p."""
        return self.split(self._p)

    @property
    def uphill(self) -> Tensor:
        """Whether x raises φ, 0-d bool; False for a system that is lost or not started."""
        return ~(self.phi[-1] <= 0) & ~self.lost if self.phi else torch.zeros_like(self.lost)

    @property
    def failed(self) -> Tensor:
        """Whether x must not be used, 0-d bool."""
        return self.lost | self.uphill

    def split(self, v: Tensor) -> list[Tensor]:
        """Views of a vector [d] in the shapes of the parameters."""
        pieces = v.split([p.numel() for p in self.parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    def start(self, Gx: Sequence[Tensor] | None) -> None:
        """Compute residual and first direction from Gx = G_bb x; None for a start at zero."""
        self.r = -self.g if Gx is None else -self.g - self._with_damping(Gx, self.x)
        # xᵀ(G + Λ)x = xᵀ(-g - r)
        self.phi.append(0.5 * torch.dot(self.x, self.g - self.r))
        z = self._preconditioned()
        self.rz = torch.dot(self.r, z)
        self.least = torch.finfo(z.dtype).eps ** 2 * self.rz  # of rᵀz: below it is rounding
        self._p = z.clone()
        self.lost = self.lost | ~is_finite(self.rz)
        self.active = ~self.lost & (self.rz > 0)

    def advance(self, Gp: Sequence[Tensor], stop: StopRule | None) -> None:
        """Do one iteration with Gp = G_bb p."""
        Ap = self._with_damping(Gp, self._p)
        bend = torch.dot(self._p, Ap)
        self.lost = self.lost | (self.active & ~is_finite(bend))
        self.flat = self.flat | (self.active & (bend <= 0))
        self.active = self.active & is_finite(bend) & (bend > 0)
        alpha = self.rz / bend
        _move_(self.x, alpha, self._p, self.active)
        _move_(self.r, -alpha, Ap, self.active)
        self.iterations += self.active
        self.phi.append(
            torch.where(self.active, self.phi[-1] - 0.5 * alpha * self.rz, self.phi[-1])
        )
        z = self._preconditioned()
        before, self.rz = self.rz, torch.dot(self.r, z)
        self.active = self.active & (self.rz > self.least)
        if stop is not None:
            self.active = self.active & ~stop(self.phi)
        scaled_sum(z, self._p, self.rz / before, out=self._p)

    def _preconditioned(self) -> Tensor:
        return self.r if self.D is None else self.r / self.D

    def _with_damping(self, Gv: Sequence[Tensor], v: Tensor) -> Tensor:
        """(G_bb + Λ) v, in memory that the next call overwrites."""
        parts = zip(Gv, self.split(v), self.damping, self.split(self._damped), strict=True)
        for product, own, damping, out in parts:
            scaled_sum(product.to(own.dtype), own, damping, out=out)
        return self._damped


def scaled_sum(a: Tensor, b: Tensor, factor: float | Tensor, out: Tensor) -> Tensor:
    """Compute out <- a + factor b in one pass; a factor on a device stays there."""
    if not isinstance(factor, Tensor) or free_to_read(factor):
        return torch.add(a, b, alpha=float(factor), out=out)
    return torch.addcmul(a, b, factor.to(b.dtype), out=out)


def _move_(x: Tensor, step: Tensor, p: Tensor, where: Tensor) -> None:
    """Compute x <- x + step p in place if `where`."""
    if free_to_read(where):
        if bool(where):
            x.add_(p, alpha=step.item())
    else:
        x.copy_(torch.where(where, torch.addcmul(x, p, step), x))


def solve(
    systems: Sequence[System],
    products: Products,
    limit: int,
    stop: StopRule | None = None,
    kept: Collection[int] = (),
) -> None:
    """Advance every system to its end, or by at most `limit` iterations.

    kept: iterations whose iterates the systems store.
    """
    _sweep([(i, s) for i, s in enumerate(systems) if s.warm], products, System.start)
    for system in systems:
        if not system.warm:
            system.start(None)
    for iteration in range(1, limit + 1):
        live = [(i, s) for i, s in enumerate(systems) if not s.done]
        if not live:
            break
        _sweep(live, products, lambda system, Gp: system.advance(Gp, stop))
        if iteration in kept:
            for system in systems:
                system.iterates.append((system.x.clone(), system.phi[-1]))
    for system in systems:
        system.lost = system.lost | ~is_finite(system.x.sum())


def _sweep(
    live: Sequence[tuple[int, System]],
    products: Products,
    use: Callable[[System, Sequence[Tensor]], None],
) -> None:
    """Compute one product per system in one call and hand each to its system."""
    if live:
        found = products([i for i, _ in live], [system.direction for _, system in live])
        for (_, system), product in zip(live, found, strict=True):
            use(system, product)
