"""Conjugate gradients for several systems at once, each with a minimum of its own to go to.

System b is (G_bb + Λ) x = -g, the minimum of φ(x) = ½ xᵀ(G_bb + Λ)x + gᵀx. All advance together, so
that one sweep through the model serves those that go on; one that has ended drops out. Nothing
waits for a device: there the end is noticed some iterations late, which changes no result. Several
processes do wait, for they share the products and must agree on who is still there.

Source: Martens 2010, Deep learning via Hessian-free optimization, section 4; the stopping rule as
we recall it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core import distributed, settings
from ...core.refresher import to_host
from ...linalg.basics import free_to_read, is_finite

# (places of some of the systems, v of each in the shapes of its parameters) -> G_bb v likewise
Products = Callable[[Sequence[int], Sequence[Sequence[Tensor]]], Sequence[Sequence[Tensor]]]


@dataclass(frozen=True)
class RelativeProgress:
    """Stop at iteration i when φ_i < 0 and (φ_i - φ_{i-k}) / φ_i < k tolerance, i > k.

    k = max(least, share i), so that progress is averaged over longer stretches later on.

    Raises: ValueError for a bad setting.
    """

    tolerance: float = 5e-4
    least: int = 10
    share: float = 0.1

    def __post_init__(self) -> None:
        settings.positive("tolerance", self.tolerance)
        settings.at_least_one("least", self.least)
        settings.fraction("share", self.share)

    def reached(self, phi: Sequence[Tensor]) -> Tensor:
        """Whether to stop after these values of φ, the start's first; 0-d bool."""
        i = len(phi) - 1
        k = max(self.least, int(self.share * i))
        if i <= k:
            return torch.zeros_like(phi[-1], dtype=torch.bool)
        now, then = phi[-1], phi[-1 - k]
        return (now < 0) & ((now - then) / now < k * self.tolerance)


@dataclass(eq=False)
class System:
    """One block's system under way; vectors [d] are its parameters one after another.

    parameters: of the block, those that have a gradient. g: that, and minus the right-hand side.
    damping: of each parameter, numbers or 0-d tensors. x: the solution so far, from the start on;
    warm: whether that is not zero. D: diagonal of the preconditioner, or None.

    active: whether it goes on. lost: whether g, a product or x was not finite. flat: whether
    pᵀ(G + Λ)p was not positive, where it ends with what it has. iterations: that changed x.
    All 0-d.
    phi: φ at the start and after each iteration. iterates: x and φ of those that were kept.
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
        """Whether it is known to have ended."""
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
        """What G_bb is to be multiplied with next, in the shapes of the parameters: x, then p."""
        return self.split(self._p)

    @property
    def uphill(self) -> Tensor:
        """Whether x would raise φ, 0-d; not known of one that is lost or was not started."""
        return ~(self.phi[-1] <= 0) & ~self.lost if self.phi else torch.zeros_like(self.lost)

    @property
    def failed(self) -> Tensor:
        """Whether x must not be used, 0-d."""
        return self.lost | self.uphill

    def split(self, v: Tensor) -> list[Tensor]:
        """Views of a vector [d] in the shapes of the parameters."""
        parts = v.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def precondition(self, diagonal: Sequence[Tensor], power: float) -> None:
        """D = (diagonal + damping)^power; diagonal like the parameters."""
        pairs = zip(diagonal, self.damping, strict=True)
        D = torch.cat([(own.to(self.g.dtype) + damping).reshape(-1) for own, damping in pairs])
        self.D = D.pow_(power)

    def start(self, Gx: Sequence[Tensor] | None) -> None:
        """Residual and first direction; Gx: G_bb x, None for a start at zero."""
        self.r = -self.g if Gx is None else -self.g - self._with_damping(Gx, self.x)
        # xᵀ(G + Λ)x = xᵀ(-g - r)
        self.phi.append(0.5 * torch.dot(self.x, self.g - self.r))
        z = self._preconditioned()
        self.rz = torch.dot(self.r, z)
        self.least = torch.finfo(z.dtype).eps ** 2 * self.rz  # of rᵀz: below it is rounding
        self._p = z.clone()
        self.lost = self.lost | ~is_finite(self.rz)
        self.active = ~self.lost & (self.rz > 0)

    def advance(self, Gp: Sequence[Tensor], stop: RelativeProgress | None) -> None:
        """One iteration, by G_bb p."""
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
            self.active = self.active & ~stop.reached(self.phi)
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
    """Out <- a + factor b, in one pass; a factor on a device stays there."""
    if not isinstance(factor, Tensor) or free_to_read(factor):
        return torch.add(a, b, alpha=float(factor), out=out)
    return torch.addcmul(a, b, factor.to(b.dtype), out=out)


def _move_(x: Tensor, step: Tensor, p: Tensor, where: Tensor) -> None:
    """X <- x + step p, if `where`."""
    if free_to_read(where):
        if bool(where):
            x.add_(p, alpha=step.item())
    else:
        x.copy_(torch.where(where, torch.addcmul(x, p, step), x))


def solve(
    systems: Sequence[System],
    products: Products,
    limit: int,
    stop: RelativeProgress | None = None,
    kept: Collection[int] = (),
) -> None:
    """Advance all systems to the end of each, or by at most `limit` iterations.

    kept: iterations whose results the systems keep.
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
    """One product for each of these systems, in one call."""
    if live:
        found = products([i for i, _ in live], [system.direction for _, system in live])
        for (_, system), product in zip(live, found, strict=True):
            use(system, product)
