"""EKFAC: KFAC's eigenvectors with corrected eigenvalues."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from ...blocks.blocks import Block
from ...capture.capture import Accumulate, Totals
from ...core import settings as checks
from ...core.base import CurvatureOptimizer, Live
from ...core.fisher import FisherOptimizer
from ...core.inversions import Job
from ...core.kronecker_factors import factors_of, learn_factors, warm_factors
from ...core.stacks import Stack
from ...linalg.operators import KroneckerEigen, Operator, by_group
from .formulas import (
    carry_columns_,
    carry_rows_,
    eigenvectors,
    factors_and_examples_of,
    learn_from_gradient,
    learn_scalings,
    scaled,
    values_between,
)

RA_DECAY = 0.75  # of EKFAC-ra's scalings


class EKFAC(FisherOptimizer):
    """KFAC with corrected eigenvalues: W_bar <- W_bar - lr U_G[(U_Gᵀ M U_A)/(S + damping)]U_Aᵀ.

    U_A, U_G hold the eigenvectors of KFAC's A and G. S, out x in+1, is a running average of
    E_n[(U_Gᵀ V_n U_A)²], V_n the gradient of one example, summed over its positions before it is
    squared: the best diagonal between these eigenvectors. A new basis takes S with it, as the
    diagonal of the same matrix; `warm_up` starts S from KFAC's eigenvalues, since single examples
    in the basis of all batches would take a second pass. M is an average. A change of the damping
    acts at once. On update steps layer inputs and their gradients, of all micro-batches, are kept
    until the step. `EKFACra` has cheaper, noisier eigenvalues.

    State of each weight: A, U_A [in+1, in+1]; G, U_G [out, out]; S [out, in+1].
    Source: George et al. 2018, arXiv:1806.03884, section 3, with the scalings as running averages;
    convolutions as in arXiv:1602.01407. Carrying S over is ours; so are lr and damping, KFAC's.
    """

    _former: ClassVar[dict[str, tuple[Any, str]]] = {
        "scalings": ("examples", "for scalings from the mini-batch gradient use EKFACra"),
        "scalings_decay": (None, "decay is that of the scalings too; EKFACra has its own"),
    }

    def curvature(self) -> dict[str, Operator]:
        """{module name: U diag(S) Uᵀ}, the undamped Fisher blocks, live views."""
        return self._operators(lambda stack, block: _between(stack, block, stack["S"]))

    def _accumulate(self) -> Accumulate:
        return factors_and_examples_of(self._harness.setting("likelihood"))

    def _learn(self, live: Live) -> None:
        """A and G of an update step, the eigenvectors that are due, then S between them."""
        harness, learned = self._harness, []
        if harness.capture.accumulate is not None:
            for stack, totals in harness.collected(live).items():
                ok = learn_factors(stack, totals, harness.scale)
                if "S" not in stack:
                    stack.hold(S=stack.zeros(*stack.shape))
                harness.start(stack, totals)
                learned.append((stack, totals, ok))
        self._ready(live)
        for stack, totals, ok in learned:
            harness.learned(stack, self._learn_scalings(stack, totals, ok), totals)

    def _learn_scalings(self, stack: Stack, totals: dict[Block, Totals], ok: Tensor) -> Tensor:
        """S where A and G were learned; which learned, [size] bool."""
        return learn_scalings(stack, totals, self._harness.sum_scale, stack.group["decay"], ok)

    def _warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        def average(stack: Stack, totals: dict[Block, Totals], batch: int) -> None:
            warm_factors(stack, totals, batch)
            stack.hold(S=stack.zeros(*stack.shape))

        self._average_by(closures, factors_of(self._harness.setting("likelihood")), average)
        with self._harness.exact():
            for stack in self._harness.stacks:
                rows = values_between(stack["G"], stack["U_G"])
                columns = values_between(stack["A"], stack["U_A"])
                # rounding leaves eigenvalues of zero slightly negative
                stack["S"].copy_((rows[:, :, None] * columns[:, None]).clamp_(min=0.0))

    def _inversions(self, stack: Stack) -> tuple[Job, ...]:
        columns, rows = partial(carry_columns_, stack["S"]), partial(carry_rows_, stack["S"])
        return (
            Job(stack, "A", "U_A", eigenvectors, 0.0, replacing=columns),
            Job(stack, "G", "U_G", eigenvectors, 0.0, replacing=rows),
        )

    def _direction(self, stack: Stack) -> Tensor:
        return scaled(stack["momentum"], stack["U_G"], stack["U_A"], _inverse_values(stack))

    def _operator(self, stack: Stack, block: Block) -> Operator:
        """U diag(1 / (S + damping)) Uᵀ, U = U_G ⊗ U_A, with the damping of now."""
        return _between(stack, block, _inverse_values(stack))


class EKFACra(EKFAC):
    """EKFAC-ra: S averages m (U_Gᵀ ∇ U_A)², ∇ the mini-batch gradient of m examples.

    ∇ is of the data's labels, without weight decay. No rows of single examples are kept. All else
    is as in `EKFAC`.

    scalings_decay: of S, in [0, 1); the paper's by default.
    Source: arXiv:1806.03884, section 4.

        >>> EKFACra(nn.Linear(3, 2)).param_groups[0]["scalings_decay"]
        0.75
    """

    _former: ClassVar[dict[str, tuple[Any, str]]] = {
        "scalings": ("gradient", "for scalings from single examples use EKFAC")
    }

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        damping: float = 3.0,
        momentum: float = 0.9,
        decay: float = 0.9,
        weight_decay: float = 0.0,
        likelihood: str = "bernoulli",
        update_every: int = 1,
        refresh_every: int = 20,
        *,
        scalings_decay: float = RA_DECAY,
        stagger: bool = False,
        decoupled_weight_decay: bool = False,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        CurvatureOptimizer.__init__(self, model, groups, locals())

    def _check(self, settings: dict[str, Any]) -> None:
        checks.fraction("scalings_decay", _own_decay(settings))

    def _accumulate(self) -> Accumulate:
        return factors_of(self._harness.setting("likelihood"))

    def _learn_scalings(self, stack: Stack, totals: dict[Block, Totals], ok: Tensor) -> Tensor:
        G = self._harness.gradient(stack, list(totals), decay=False)
        return learn_from_gradient(stack, totals, G, _own_decay(stack.group), ok)


def _own_decay(settings: dict[str, Any]) -> float:
    """The decay of EKFACra's scalings; None in states of earlier versions is the paper's."""
    own = settings["scalings_decay"]
    return RA_DECAY if own is None else own


def _between(stack: Stack, block: Block, values: Tensor) -> Operator:
    """U diag(values) Uᵀ of a block."""
    place = stack.places[block]
    parts = zip(stack["U_G"][place], stack["U_A"][place], values[place], strict=True)
    return by_group([KroneckerEigen(*part) for part in parts])


def _inverse_values(stack: Stack) -> Tensor:
    """1 / (S + damping), [size, out, in+1]."""
    return (stack["S"] + stack.group["damping"]).reciprocal_()
