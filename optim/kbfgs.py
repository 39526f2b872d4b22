"""K-BFGS and K-BFGS(L): inverse Hessian blocks H_g ⊗ H_a, both factors by BFGS.

Source: Goldfarb, Ren, Bahamou 2020, arXiv:2006.08877, and its published code.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optim import checks
from optim.bfgs import acceptable, append_, bfgs_, double_damping
from optim.capture import NOT_WARM, Call, Capture, Totals
from optim.checkpoint import exact_state
from optim.layers import (
    Block,
    add_gradient_,
    find_blocks,
    live_blocks,
    move_,
    plain_steps_,
    pre_activation_mean,
)
from optim.linalg import (
    all_finite,
    damped_inverses,
    factor_dtype,
    lerp_if_,
    running_mean,
    second_moment,
)
from optim.operators import CompactInverse, Kronecker
from optim.passes import random_state, replayed, run, untouched
from optim.summary import table

COUNTS = (
    "H_g accepted",
    "H_g skipped",
    "H_a accepted",
    "H_a skipped",
    "Powell fired",
    "second damping fired",
    "not finite",
)


def means(totals: Totals, call: Call, delivered: Tensor) -> None:
    """Mean input x̄ [in+1] and mean gradient ḡ [out]: all that the second pass is asked for.

    The rows delivered under a mean loss are g_n / m, so their sum is the mean.
    """
    if not call.counted:
        ones, seen = call.block.bias is not None, totals.count
        totals.means["x"] = running_mean(totals.means.get("x"), call.x, seen, ones=ones)
    g = delivered.sum(0)
    totals.means["g"] = totals.means["g"] + g if "g" in totals.means else g


def moments(totals: Totals, call: Call, delivered: Tensor) -> None:
    """The means and the second moment of the inputs, [in+1, in+1]."""
    if not call.counted:
        ones, seen = call.block.bias is not None, totals.count
        totals.means["xx"] = second_moment(totals.means.get("xx"), call.x, seen, ones=ones)
    means(totals, call, delivered)


def held_h_g(state: dict[str, Tensor]) -> Tensor | CompactInverse:
    """H_g as the state holds it: dense, or by its last pairs."""
    if "H_g" in state:
        return state["H_g"]
    return CompactInverse(state["S"], state["Y"], state["R"], state["YY"])


def update_h_g_(
    state: dict[str, Tensor], s: Tensor, y: Tensor, gradient: Tensor, mu_2: float
) -> Tensor:
    """One damped BFGS update of H_g by the averaged pair.

    Returns: [3] bool: accepted, Powell fired, second damping fired.
    """
    H = held_h_g(state)
    pair = double_damping(s, y, H, mu_2)
    accept = pair.valid & acceptable(pair.s, pair.y, gradient)
    store = append_ if isinstance(H, CompactInverse) else bfgs_
    accept = store(H, pair.s, pair.y, accept)  # type: ignore[arg-type]
    return torch.stack([accept, pair.powell & pair.valid, pair.second & pair.valid])


def hessian_action_(H_a: Tensor, A: Tensor, x: Tensor, lambda_a: float) -> Tensor:
    """BFGS on H_a with the exact pair s = H_a x̄, y = (A + λ_A I) s; no damping is needed.

    Returns: whether it was accepted, 0-d bool tensor.
    """
    s = H_a @ x
    y = torch.addmv(s, A, s, beta=lambda_a)
    return bfgs_(H_a, s, y, acceptable(s, y, x))


class KBFGS(Optimizer):
    """Kronecker-factored BFGS: W_bar <- W_bar - lr H_g M H_a for each nn.Linear.

    M <- momentum M + (1 - momentum) (∇ + weight_decay W_bar) is an average: heavy-ball
    learning rates (m <- 0.9 m + ∇) differ by a factor of ten. Weight decay is coupled (L2), for
    biases too. Parameters outside nn.Linear layers take lr M. `summary()` says which are which.

    Each step evaluates the closure twice on the same batch, at θ and at θ - lr P; dropout masks
    repeat, buffers and .grad end as the first evaluation left them. The closure must call
    zero_grad, and return the mean over the batch of per-example losses; for micro-batches of
    m_i out of M examples scale each loss by m_i / M.

    model: its layers see one row per example, [batch, in], once per forward.
    lr: step size, >= 0.  damping: λ > 0; λ_A = mu_2 = √λ.
    momentum, decay: of M, and of A and of the pair (s, y), in [0, 1).
    history: None for dense H_g [out, out]; p for K-BFGS(L), the last p pairs.

    State of each weight: A, H_a [in+1, in+1]; H_g [out, out], or S, Y [p, out] with R, YY [p, p];
    averaged s, y [out]; momentum [out, in+1]; counts, in the order of `COUNTS`. Factors are
    float32, or float64 for float64 parameters. The number of steps is param_groups[0]["step"].

    Raises: ValueError for a bad setting or a layer used in an unsupported way, naming it.
    Source: arXiv:2006.08877, algorithm and defaults of its published code (MNIST autoencoder,
    loss summed over 784 pixels). Its first pass over the data is `warm_up`.

        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(3, 2)
        >>> x = torch.randn(8, 3)
        >>> opt = KBFGS(model, lr=0.1)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = model(x).square().sum(1).mean()
        ...     loss.backward()
        ...     return loss
        >>> losses = [opt.step(closure).item() for _ in range(20)]
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.3,
        damping: float = 0.3,
        momentum: float = 0.9,
        decay: float = 0.9,
        weight_decay: float = 0.0,
        history: int | None = None,
    ) -> None:
        settings = {
            "lr": lr,
            "damping": damping,
            "momentum": momentum,
            "decay": decay,
            "weight_decay": weight_decay,
        }
        checks.common(settings)
        if history is not None:
            checks.at_least_one("history", history)
        super().__init__(checks.trainable(model), {**settings, "history": history, "step": 0})
        self._model = model
        self._blocks = find_blocks(model)
        self._capture = Capture(model, self._blocks)
        self._frozen = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One iteration; returns the loss before it.

        Raises: TypeError without a closure; ValueError naming a layer whose statistics are
        missing or are not those of one row per example.
        """
        closure = checks.needed(closure)
        start = random_state(self._model)
        with self._capture.recording(None if self._frozen else moments):
            loss = run(closure)
        blocks = live_blocks(self._blocks)
        first = {} if self._frozen else self._capture.collect(blocks)
        z = {block: self._learn_a(block, total) for block, total in first.items()}
        for block in blocks:
            self._move(block)
        plain_steps_(self, self._blocks)
        second = self._second_pass(closure, start, first) if first else {}
        for block in first:
            self._learn_h(block, first[block], second[block], z[block])
        self._capture.clear()
        self.param_groups[0]["step"] += 1
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and the statistics gathered with them."""
        super().zero_grad(set_to_none)
        self._capture.clear()

    def warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        """Start A from the mean over batches of E[x̃ x̃ᵀ], as the paper does, before step 1.

        closures: each runs the model on one batch (a forward is enough, under no_grad too).
        Parameters, .grad and buffers end as they were.

        Raises: RuntimeError after the first step; ValueError if a layer saw no batch.
        """
        if self.param_groups[0]["step"] or self.state:
            raise RuntimeError("warm_up comes once, before the first step")
        A: dict[Block, Tensor] = {}
        with untouched(self._model):
            for j, closure in enumerate(closures, start=1):
                with self._capture.recording(_moments_of_x, eager=True):
                    closure()
                totals = self._capture.collect(self._blocks, NOT_WARM)
                for block, total in totals.items():
                    xx = total.means["xx"]
                    A[block] = A[block].lerp_(xx, 1 / j) if block in A else xx
        self._capture.clear()
        if not A:
            raise ValueError("warm_up saw no batch: its argument is an iterable of callables")
        for block in self._blocks:
            self._start(block, A[block])

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, steps leave A, H_a, H_g and the pair as they are, and need one pass only."""
        before, self._frozen = self._frozen, True
        try:
            yield
        finally:
            self._frozen = before

    def preconditioner(self) -> dict[str, Kronecker]:
        """{module name: H_g ⊗ H_a}, live views of what the next step applies.

        For history=p the left factor is a CompactInverse; `left @ torch.eye(out)` makes it dense.

        Raises: RuntimeError before there is a state.
        """
        states = {b.name: self.state[b.weight] for b in self._blocks if b.weight in self.state}
        if not states:
            raise RuntimeError("no state yet: take a step or call warm_up first")
        return {name: Kronecker(held_h_g(s), s["H_a"]) for name, s in states.items()}

    def summary(self) -> str:
        """A table: each parameter, how it is trained, the memory of its state, its counters."""
        return table(self, self._model, self._blocks, COUNTS)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict()` bit for bit, factors in their own precision."""
        super().load_state_dict(state_dict)
        exact_state(self, state_dict)
        self._capture.clear()

    def _start(self, block: Block, A: Tensor) -> dict[str, Tensor]:
        """First state of a block: H_g = I, H_a = (A + √damping I)⁻¹, the only inverse taken."""
        (out, size), dtype = block.shape, factor_dtype(block.weight)
        new: dict[str, Any] = {"dtype": dtype, "device": block.weight.device}
        (H_a,) = damped_inverses([A], self.param_groups[0]["damping"] ** 0.5)
        if H_a is None:
            raise RuntimeError(
                f"layer '{block.name}': A + √damping I cannot be inverted; look for inputs that "
                "are not finite or very large, scale them, or raise the damping"
            )
        state = self.state[block.weight]
        state.update(A=A, H_a=H_a)
        p = self.param_groups[0]["history"]
        if p is None:
            state["H_g"] = torch.eye(out, **new)
        else:
            state["S"], state["Y"] = torch.zeros(p, out, **new), torch.zeros(p, out, **new)
            state["R"], state["YY"] = torch.eye(p, **new), torch.zeros(p, p, **new)
        state["s"], state["y"] = torch.zeros(out, **new), torch.zeros(out, **new)
        state["momentum"] = torch.zeros(out, size, **new)
        state["counts"] = torch.zeros(len(COUNTS), dtype=torch.int64, device=block.weight.device)
        return state

    def _learn_a(self, block: Block, total: Totals) -> Tensor:
        """A <- decay A + (1 - decay) E[x̃ x̃ᵀ]; returns z̄ at the old point.

        Skipped at step 0 after warm_up: that A is of the whole data set already.
        """
        group, xx = self.param_groups[0], total.means.pop("xx")
        ok = all_finite(xx.diagonal())
        xx.nan_to_num_(0.0, 0.0, 0.0)
        state = self.state.get(block.weight)
        if not state:
            self._start(block, xx.mul_(ok * (1 - group["decay"])))
        elif group["step"] > 0:
            lerp_if_(state["A"], xx, 1 - group["decay"], ok)
        return pre_activation_mean(block, total.means["x"])

    def _move(self, block: Block) -> None:
        """W_bar <- W_bar - lr H_g M H_a, with the factors of the step before."""
        group, state = self.param_groups[0], self.state.get(block.weight)
        if not state:
            raise RuntimeError(f"layer '{block.name}' has no state to freeze: take a step first")
        finite = add_gradient_(state["momentum"], block, group)
        state["counts"][-1] += ~finite
        move_(block, held_h_g(state) @ state["momentum"] @ state["H_a"], group["lr"], finite)

    def _second_pass(
        self, closure: Callable[[], Tensor], start: Any, first: dict[Block, Totals]
    ) -> dict[Block, Totals]:
        """Means at the new point, on the same batch with the same dropout masks."""
        with untouched(self._model), replayed(self._model, start):
            with self._capture.recording(means):
                run(closure)
            second = self._capture.collect(list(first))
        for block, total in first.items():
            if second[block].count != total.count:
                raise ValueError(
                    f"the closure's two calls gave layer '{block.name}' {total.count} and "
                    f"{second[block].count} rows: both must use the same batch, so draw it "
                    "outside the closure"
                )
        return second

    def _learn_h(self, block: Block, first: Totals, second: Totals, z: Tensor) -> None:
        """Average the pair, update H_g by it and H_a by its Hessian action, and count."""
        state, group = self.state[block.weight], self.param_groups[0]
        root = group["damping"] ** 0.5
        s = pre_activation_mean(block, second.means["x"]) - z
        y = second.means["g"] - first.means["g"]
        ok = all_finite(s) & all_finite(y)
        for key, new in (("s", s), ("y", y)):
            lerp_if_(state[key], torch.where(ok, new, 0.0), 1 - group["decay"], ok)
        # a bad pair left the averages alone; NaN as gradient norm makes the skip rule refuse it
        gradient = torch.where(ok, first.means["g"], float("nan"))
        g_flags = update_h_g_(state, state["s"], state["y"], gradient, root)
        accepted = hessian_action_(state["H_a"], state["A"], first.means["x"], root)
        flags = [g_flags[0], ~g_flags[0], accepted, ~accepted, g_flags[1], g_flags[2], ~ok]
        state["counts"] += torch.stack(flags)


def _moments_of_x(totals: Totals, call: Call, _: Tensor) -> None:
    ones, seen = call.block.bias is not None, totals.count
    totals.means["xx"] = second_moment(totals.means.get("xx"), call.x, seen, ones=ones)
