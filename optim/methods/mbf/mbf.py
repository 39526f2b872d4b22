"""MBF: mini-block Fisher, a block-diagonal empirical Fisher of many small blocks per layer."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from ...blocks.blocks import Block
from ...core.base import CurvatureOptimizer, Live
from ...core.inversions import Job
from ...core.kronecker_factors import learn_moments
from ...core.momentum import gradient_of
from ...core.stacks import Stack
from ...core.warm_up import warm_gradients
from ...linalg.basics import free_to_read, known_true
from ...linalg.operators import Operator
from . import mini_blocks

ONE_FORM = "MBF has one form: mini-batch gradients, shared rows, a mini-block for each kernel"


class MBF(CurvatureOptimizer):
    """Mini-block Fisher: w_s <- w_s - lr (M_s + damping I)⁻¹ m_s for every slice w_s of W_bar.

    Slices of a Linear layer are the rows of W_bar, with one M, the mean over rows; those of a
    Conv2d are its kernels of kh * kw weights and its single biases, each with an M of its own.
    M <- decay M + (1 - decay) ĝ_s ĝ_sᵀ from zero or from `warm_up`; ĝ is the gradient of the
    mini-batch mean as it stands in .grad when step() begins, without weight decay. No hooks.

    Momentum is a heavy ball. Inverses are refreshed at steps
    0, refresh_every, 2 refresh_every, ... The paper's periods are not known to us; 1 and 20 (10
    and 100 for CNNs) are TNT's. weight_decay is decoupled unless decoupled_weight_decay=False.

    State of each weight: M, M_inv [in+1, in+1]; in a convolution M, M_inv [O, I, kh*kw, kh*kw] and
    M_bias, M_bias_inv [O, 1, 1].
    Source: Bahamou, Goldfarb, Ren 2023, arXiv:2202.04124, section 3. The paper leaves open whether
    gradients are of the mini-batch or of examples; its cost claim favours the former. The defaults
    of lr and damping are ours, from small trials: lr / damping is what matters most.
    """

    heavy_ball = True
    _former: ClassVar[dict[str, tuple[Any, str]]] = {
        "estimator": ("minibatch", ONE_FORM),
        "fc_group": ("output", ONE_FORM),
        "fc_share": (True, ONE_FORM),
        "conv_share": ("none", ONE_FORM),
    }
    _all_until = 1

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        damping: float = 0.1,
        momentum: float = 0.9,
        decay: float = 0.9,
        weight_decay: float = 0.0,
        update_every: int = 1,
        refresh_every: int = 20,
        *,
        stagger: bool = False,
        decoupled_weight_decay: bool = True,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(model, groups, locals())

    def curvature(self) -> dict[str, Operator]:
        """{module name: block-diagonal matrix of the undamped mini-blocks}, live views."""
        return self._operators(mini_blocks.operator)

    def _learn(self, live: Live) -> dict[Stack, Tensor]:
        learned: dict[Stack, Tensor] = {}
        if self._harness.updating:
            for stack, blocks in live.items():
                learned[stack] = self._update(stack, blocks)
                self._harness.start(stack, blocks)
                self._harness.count(stack, {"updates": learned[stack]})
        self._ready(live)
        return learned

    def _move(self, live: Live, learned: dict[Stack, Tensor]) -> None:
        harness = self._harness
        for stack, blocks in live.items():
            # mini-blocks of the gradient itself were finite: so is the gradient
            own = learned.get(stack)
            ok = harness.absorb(stack, blocks, own)
            if own is not None and not known_true(own):
                # what absorb counted is not counted again
                harness.count(stack, {"not finite": ~own & ok})
            harness.move(stack, blocks, self._direction(stack), ok)
        harness.plain_steps()

    def _direction(self, stack: Stack) -> Tensor:
        return mini_blocks.applied(stack)

    def _operator(self, stack: Stack, block: Block) -> Operator:
        return mini_blocks.operator(stack, block, "_inv")

    def _warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        harness = self._harness
        for batch, gradients in warm_gradients(harness, closures, decay=False):
            with harness.exact():
                for stack, G in gradients.items():
                    harness.start(stack, stack.blocks)
                    new = mini_blocks.moments(stack.blocks[0], G)
                    ok = learn_moments(stack, stack.mask(stack.blocks), 1 / batch, **new)
                    harness.count(stack, {"not finite": ~ok})
        self._refresh()

    def _update(self, stack: Stack, blocks: list[Block]) -> Tensor:
        """M <- decay M + (1 - decay) ĝ ĝᵀ where that is finite; whose M learned, [size] bool."""
        decay = stack.group["decay"]
        if self._is_one_product(stack, blocks):
            for block in blocks:
                W, *b = [gradient_of(p).to(stack.dtype) for p in block.parameters]
                mini_blocks.learn_rows_(stack.of(block, "M")[0], W, b[0] if b else None, decay)
            return stack.mask(blocks)
        G = self._harness.gradient(stack, blocks, decay=False)
        new = mini_blocks.moments(stack.blocks[0], G)
        return learn_moments(stack, stack.mask(blocks), 1 - decay, **new)

    def _is_one_product(self, stack: Stack, blocks: list[Block]) -> bool:
        """Whether M can take ∇ᵀ ∇ straight in: rows of all layers, known to be finite."""
        if stack.convolutional or len(blocks) < len(stack.blocks) or "M" not in stack:
            return False
        return free_to_read(stack["M"]) and mini_blocks.squares_finite(blocks, stack.dtype)

    def _inversions(self, stack: Stack) -> list[Job]:
        damping, names = stack.group["damping"], [n for n in ("M", "M_bias") if n in stack]
        return [Job(stack, n, f"{n}_inv", mini_blocks.mini_inverse, damping) for n in names]
