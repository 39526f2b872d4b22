"""K-BFGS: a layer's Hessian block from the updates of Kronecker-factored BFGS."""

from ..operators import Kronecker, inverse
from ..problem import Block, Problem
from ..registry import approximation
from ._kbfgs.replay import Replay, replay_state


@approximation(
    reference="Goldfarb, Ren and Bahamou 2020 (arXiv:2006.08877)",
    damping_inside=True,
)
def kbfgs(
    problem: Problem,
    block: Block,
    of: str = "hessian",
    damping: float = 0.3,
    steps: int = 50,
    batch: int | None = None,
) -> Kronecker:
    """The curvature H_g⁻¹ ⊗ H_a⁻¹ that K-BFGS's preconditioner implies after `steps` minibatches.

    The parameters stay at the problem's θ: each step draws `batch` of its examples (None: a
    quarter), tries K-BFGS's direction in all Linear, Conv1d and Conv2d layers jointly, learns from
    the change of the minibatch's pre-activations and their gradients, and goes back. H_g starts at
    I, H_a at (A + √λ I)⁻¹; pairs are averaged and damped as in the papers.
    Gives [out, out] ⊗ [in+1, in+1], with the damping inside (√λ in H_a⁻¹, the pairs' dampings in
    H_g⁻¹): damped metrics take it with approximation_damping=0.

    Raises: ValueError for an `of` other than "hessian", a block that is not one whole layer called
    once (a grouped convolution is not), settings that are not positive or a batch larger than the
    problem; RuntimeError where no pair was usable.
    """
    if of != "hessian":
        raise ValueError(
            f"kbfgs approximates the hessian, not '{of}': it learns from changes of the gradient; "
            f"to hold it against another truth give that truth to the metric"
        )
    state = replay_state(problem, block, Replay(damping, steps, batch))
    found = inverse(Kronecker(state.H_g, state.H_a))
    assert isinstance(found, Kronecker)
    return found
