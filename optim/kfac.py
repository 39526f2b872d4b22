"""KFAC: Fisher blocks G ⊗ A, inverted factor by factor.

Source: Martens, Grosse 2015, arXiv:1503.05671, in the form that the published code of
arXiv:2006.08877 compares with: no trace balancing, rescaling or adaptive damping.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optim import checks
from optim.capture import NOT_WARM, Accumulate, Call, Capture, Totals
from optim.checkpoint import exact_state
from optim.layers import Block, add_gradient_, find_blocks, live_blocks, move_, plain_steps_
from optim.likelihoods import LIKELIHOODS, sampled_score
from optim.linalg import all_finite, damped_inverses, factor_dtype, gram_, lerp_if_, second_moment
from optim.operators import Kronecker
from optim.passes import run, untouched
from optim.summary import table

COUNTS = ("updates", "refreshes", "failed inverses", "not finite")
PATIENCE = 3  # failed inversions in a row before training is stopped


def sampled_factors(totals: Totals, call: Call, _: Tensor) -> None:
    """A = E[x̃ x̃ᵀ] [in+1, in+1] and G = E[g gᵀ] [out, out], g of labels drawn from the model."""
    if call.counted:
        return
    assert call.g is not None
    ones, seen, means = call.block.bias is not None, totals.count, totals.means
    means["A"] = second_moment(means.get("A"), call.x, seen, ones=ones)
    means["G"] = second_moment(means.get("G"), call.g, seen, ones=False)


def empirical_factors(totals: Totals, call: Call, delivered: Tensor) -> None:
    """A as above; G of the data's own labels, from what backward delivers under a mean loss.

    delivered = g_n / M for M examples in all micro-batches, so G = M Σ delivered deliveredᵀ;
    the sum is kept here, its factor M is known at step().
    """
    if call.counted:
        raise ValueError(
            f"layer '{call.block.name}': two backwards through one forward; the empirical "
            "Fisher needs each example's whole gradient at once, so add the losses first"
        )
    ones, seen, means = call.block.bias is not None, totals.count, totals.means
    means["A"] = second_moment(means.get("A"), call.x, seen, ones=ones)
    size = delivered.shape[1]
    GG = means.setdefault("GG", delivered.new_zeros(size, size))
    gram_(GG, delivered, beta=1.0, alpha=1.0)


def output_factor(totals: Totals) -> Tensor:
    """G [out, out], in the scale of per-example losses."""
    return totals.means["G"] if "G" in totals.means else totals.means["GG"] * totals.count


class KFAC(Optimizer):
    """Kronecker-factored curvature: W_bar <- W_bar - lr G_inv M A_inv for each nn.Linear.

    G_inv = (G + √damping I)⁻¹, A_inv = (A + √damping I)⁻¹ (pi = 1), refreshed at every step up
    to number `refresh_every` and then at each multiple of it; A and G are running averages.
    M <- momentum M + (1 - momentum) (∇ + weight_decay W_bar) is an average: heavy-ball learning
    rates (m <- 0.9 m + ∇) differ by a factor of ten. Weight decay is coupled (L2), for biases
    too. Parameters outside nn.Linear layers take lr M. `summary()` says which are which.

    The usual loop: zero_grad, forward, backward of a mean over examples, step. Labels are
    sampled inside the forward of `model` on update steps, from a generator of the optimizer's
    own (seeded from torch.initial_seed()), so the model is called itself, not its parts. For
    micro-batches of m_i out of M examples scale each loss by m_i / M.

    model: its layers see one row per example, [batch, in], once per forward; it returns a tensor.
    lr: step size, >= 0.  damping: λ > 0 of G ⊗ A, √λ on each factor.
    momentum, decay: of M, and of A and G, in [0, 1).
    likelihood: "categorical" (classes in dimension 1), "bernoulli" (logits), "gaussian" (unit
        variance, for ½ ‖output - label‖²), or "empirical": the gradients of the data's labels.
    update_every, refresh_every: steps between updates of A and G, and between inversions.

    State of each weight: A, A_inv [in+1, in+1]; G, G_inv [out, out]; momentum [out, in+1];
    counts, in the order of `COUNTS`; failures in a row. Factors are float32, or float64 for
    float64 parameters. The number of steps is param_groups[0]["step"].

    Raises: ValueError for a bad setting or a layer used in an unsupported way, naming it;
    RuntimeError if a factor cannot be inverted three times in a row.
    Source: arXiv:1503.05671, sections 3-5; defaults as in the published code of
    arXiv:2006.08877 (MNIST autoencoder, loss summed over 784 pixels).

        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(3, 2)
        >>> x, t = torch.randn(8, 3), torch.randn(8, 2)
        >>> opt = KFAC(model, lr=0.3, damping=0.1, likelihood="gaussian")
        >>> losses = []
        >>> for _ in range(20):
        ...     opt.zero_grad()
        ...     loss = 0.5 * (model(x) - t).square().sum(1).mean()
        ...     loss.backward()
        ...     opt.step()
        ...     losses.append(loss.item())
        >>> losses[-1] < losses[0]
        True
    """

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
    ) -> None:
        settings = {
            "lr": lr,
            "damping": damping,
            "momentum": momentum,
            "decay": decay,
            "weight_decay": weight_decay,
            "likelihood": likelihood,
            "update_every": update_every,
            "refresh_every": refresh_every,
        }
        checks.common(settings)
        known = [*LIKELIHOODS, "empirical"]
        if likelihood not in known:
            raise ValueError(f"no likelihood {likelihood!r}; known: {known}")
        checks.at_least_one("update_every", update_every)
        checks.at_least_one("refresh_every", refresh_every)
        parameters = checks.trainable(model)
        super().__init__(parameters, {**settings, "step": 0})
        self._model = model
        self._blocks = find_blocks(model)
        self._labels = torch.Generator(parameters[0].device).manual_seed(torch.initial_seed())
        self._capture = Capture(model, self._blocks)
        self._frozen = False
        self._schedule()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One iteration; with a closure, runs it first and returns its loss.

        Raises: ValueError naming a layer whose statistics are missing or are not those of one
        row per example; RuntimeError after three failed inversions in a row.
        """
        loss = None if closure is None else run(closure)
        group, blocks = self.param_groups[0], live_blocks(self._blocks)
        if self._capture.accumulate is not None:
            for block, total in self._capture.collect(blocks).items():
                self._learn(block, total)
        states = {block: self._ready(block) for block in blocks}
        if not self._frozen:
            self._refresh(states)
        for block, state in states.items():
            finite = add_gradient_(state["momentum"], block, group)
            move_(block, state["G_inv"] @ state["momentum"] @ state["A_inv"], group["lr"], finite)
        plain_steps_(self, self._blocks)
        group["step"] += 1
        self._schedule()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and the statistics gathered with them."""
        super().zero_grad(set_to_none)
        self._capture.clear()

    def warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        """Start A and G from their means over batches, as the papers do, before step 1.

        closures: each runs the model on one batch (and, for likelihood="empirical", backward).
        Parameters, .grad and buffers end as they were.

        Raises: RuntimeError after the first step; ValueError if a layer saw no batch.
        """
        if self.param_groups[0]["step"] or self.state:
            raise RuntimeError("warm_up comes once, before the first step")
        factors: dict[Block, tuple[Tensor, Tensor]] = {}
        with untouched(self._model):
            for j, closure in enumerate(closures, start=1):
                for block, (A, G) in self._factors_of(closure).items():
                    if block in factors:
                        factors[block][0].lerp_(A, 1 / j)
                        factors[block][1].lerp_(G, 1 / j)
                    else:
                        factors[block] = A, G
        if not factors:
            raise ValueError("warm_up saw no batch: its argument is an iterable of callables")
        for block, (A, G) in factors.items():
            self._start(block).update(A=A, G=G)
        self._refresh({block: self.state[block.weight] for block in factors})

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, steps leave A, G and their inverses as they are; no labels are sampled."""
        before, self._frozen = self._frozen, True
        self._schedule()
        try:
            yield
        finally:
            self._frozen = before
            self._schedule()

    def preconditioner(self) -> dict[str, Kronecker]:
        """{module name: G_inv ⊗ A_inv}, live views of what the last step applied.

        Raises: RuntimeError before there is a state.
        """
        return self._products("G_inv", "A_inv")

    def curvature(self) -> dict[str, Kronecker]:
        """{module name: G ⊗ A}, the undamped Fisher blocks, live views.

        Raises: RuntimeError before there is a state.
        """
        return self._products("G", "A")

    def summary(self) -> str:
        """A table: each parameter, how it is trained, the memory of its state, its counters."""
        return table(self, self._model, self._blocks, COUNTS)

    def state_dict(self) -> dict[str, Any]:
        """As in PyTorch, with the state of the label generator under "labels"."""
        return {**super().state_dict(), "labels": self._labels.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict()` bit for bit, factors in their own precision."""
        super().load_state_dict(state_dict)
        exact_state(self, state_dict)
        if "labels" in state_dict:
            self._labels.set_state(state_dict["labels"].cpu())
        self._capture.clear()
        self._schedule()

    def _schedule(self) -> None:
        """Capture on update steps only, by sampled or by the data's labels."""
        group = self.param_groups[0]
        accumulate = self._accumulate() if group["step"] % group["update_every"] == 0 else None
        self._capture.accumulate = None if self._frozen else accumulate
        self._capture.sample = None if group["likelihood"] == "empirical" else self._score

    def _accumulate(self) -> Accumulate:
        empirical = self.param_groups[0]["likelihood"] == "empirical"
        return empirical_factors if empirical else sampled_factors

    def _score(self, output: Tensor) -> Tensor:
        return sampled_score(self.param_groups[0]["likelihood"], output, self._labels)

    def _factors_of(self, closure: Callable[[], Any]) -> dict[Block, tuple[Tensor, Tensor]]:
        """A and G of the batch that a warm-up closure runs."""
        sampled = self._capture.sample is not None
        with self._capture.recording(self._accumulate(), eager=sampled):
            run(closure)
            totals = self._capture.collect(self._blocks, NOT_WARM)
        self._capture.clear()
        return {b: (total.means["A"], output_factor(total)) for b, total in totals.items()}

    def _start(self, block: Block) -> dict[str, Tensor]:
        (out, size), device = block.shape, block.weight.device
        state = self.state[block.weight]
        new: dict[str, Any] = {"dtype": factor_dtype(block.weight), "device": device}
        state["A"], state["G"] = torch.zeros(size, size, **new), torch.zeros(out, out, **new)
        state["momentum"] = torch.zeros(out, size, **new)
        state["counts"] = torch.zeros(len(COUNTS), dtype=torch.int64, device=device)
        state["failures"] = torch.zeros((), dtype=torch.int64)  # on the CPU: read on refreshes
        return state

    def _ready(self, block: Block) -> dict[str, Tensor]:
        state = self.state.get(block.weight)
        if not state:
            raise RuntimeError(
                f"layer '{block.name}' has no statistics yet: its first step must be one that "
                "updates (step number divisible by update_every, not frozen)"
            )
        return state

    def _learn(self, block: Block, total: Totals) -> None:
        """A <- decay A + (1 - decay) A_k and G likewise, unless either is not finite."""
        state = self.state.get(block.weight) or self._start(block)
        A, G = total.means["A"], output_factor(total)
        ok = all_finite(A.diagonal()) & all_finite(G.diagonal())
        weight = 1 - self.param_groups[0]["decay"]
        lerp_if_(state["A"], A.nan_to_num(0.0, 0.0, 0.0), weight, ok)
        lerp_if_(state["G"], G.nan_to_num(0.0, 0.0, 0.0), weight, ok)
        state["counts"][0] += ok
        state["counts"][3] += ~ok

    def _refresh(self, states: dict[Block, dict[str, Tensor]]) -> None:
        """New inverses where they are due; a failed one is counted and the last good one kept."""
        group = self.param_groups[0]
        k, every = group["step"], group["refresh_every"]
        due = k <= every or k % every == 0
        chosen = {b: s for b, s in states.items() if due or "A_inv" not in s}
        matrices = [state[key] for state in chosen.values() for key in ("A", "G")]
        inverses = damped_inverses(matrices, group["damping"] ** 0.5)
        pairs = zip(inverses[::2], inverses[1::2], strict=True)
        for (block, state), (A_inv, G_inv) in zip(chosen.items(), pairs, strict=True):
            if A_inv is None or G_inv is None:
                self._failed(block, state)
                continue
            for key, new in (("A_inv", A_inv), ("G_inv", G_inv)):
                # in place, so that views of preconditioner() stay live
                state[key] = state[key].copy_(new) if key in state else new
            state["failures"].zero_()
            state["counts"][1] += 1

    def _failed(self, block: Block, state: dict[str, Tensor]) -> None:
        state["failures"] += 1
        state["counts"][2] += 1
        if state["failures"] >= PATIENCE or "A_inv" not in state:
            raise RuntimeError(
                f"layer '{block.name}': A or G + √damping I could not be inverted, "
                f"{int(state['failures'])} times in a row; raise the damping "
                f"(now {self.param_groups[0]['damping']}), lower lr, or look for inputs that are "
                "not finite or very large"
            )

    def _products(self, left: str, right: str) -> dict[str, Kronecker]:
        states = {b.name: self.state[b.weight] for b in self._blocks if b.weight in self.state}
        if not states:
            raise RuntimeError("no state yet: take a step or call warm_up first")
        return {name: Kronecker(state[left], state[right]) for name, state in states.items()}
