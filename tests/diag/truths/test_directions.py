"""Steps of an iterative solver, held against exact damped solutions block by block."""

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from kronscope import optim
from kronscope.diag import Block, Dense, Problem, approximations, dense, exact, live, metrics
from kronscope.diag.cross_fit import restricted
from kronscope.diag.operators import (
    BlockDiagonal,
    Damped,
    Diagonal,
    SingleStep,
    diagonal,
    inner,
    solve,
)
from tests.optim.models import CASES

LOSSES = {
    "bernoulli": lambda z, t: F.binary_cross_entropy_with_logits(z, t, reduction="sum") / len(z),
    "categorical": F.cross_entropy,
    "gaussian": lambda z, t: 0.5 * (z - t).square().sum() / len(z),
}
SPLITS = {
    "mlp": [None, [["0"], ["2"], ["4"]], [["4", "0"]], []],
    "cnn": [None, [["0", "2"], ["4", "6"]], []],
    "shared": [None, [["spread", "mix"], ["cell", "last"]]],
}
SPLIT = [(name, blocks) for name, splits in SPLITS.items() for blocks in splits]
LAMBDA = 0.02
INSIDE = {"approximation_damping": 0}
STEPS = (metrics.step_cosine, metrics.decrease_efficiency, metrics.step_quality)


class Compared(NamedTuple):
    """One block's step, the exact GGN and the damping it was to be solved with."""

    block: Block
    truth: object
    step: SingleStep
    damping: float

    def by(self, metric):
        return metric(
            self.truth, self.step, damping=self.damping, gradient=self.step.gradient, **INSIDE
        )


def closure_of(optimizer, case, batch):
    def closure():
        optimizer.zero_grad()
        loss = case.loss(case.model, batch)
        loss.backward()
        return loss

    return closure


def problem_of(case, batch, dtype=None):
    return Problem(case.model, LOSSES[case.likelihood], *batch, dtype=dtype)


def hessian_free(case, blocks, max_cg, curvature_batch=8, **own):
    return optim.HessianFree(
        case.model, 0.5, LAMBDA, likelihood=case.likelihood, blocks=blocks, max_cg=max_cg,
        curvature_batch=curvature_batch, **own,
    )  # fmt: skip


def compared(name, blocks, max_cg, curvature_batch=8, steps=1, tau=0.0, **own):
    """A comparison per block, at the last of so many steps."""
    case = CASES[name]()
    optimizer = hessian_free(case, blocks, max_cg, curvature_batch, weight_decay=tau, **own)
    for batch in case.batches[:steps]:
        problem = problem_of(case, batch)
        optimizer.step(closure_of(optimizer, case, batch))
    taken = live.taken(optimizer, problem, tau * (not own.get("decoupled_weight_decay")))
    assert [block.name for block in taken] == [part.name for part in optimizer.parts]
    seen = problem if optimizer.rows is None else restricted(problem, optimizer.rows)
    assert seen.n == curvature_batch
    added = 0.0 if own.get("decoupled_weight_decay") else tau
    return [
        Compared(block, exact.ggn(seen, block), step, LAMBDA + added)
        for block, step in taken.items()
    ]


def conjugate_gradients(A, g, limit):
    """As in a textbook, from zero; all iterates."""
    x, r = torch.zeros_like(g), g.clone()
    p, found = r.clone(), []
    for _ in range(limit):
        alpha = (r @ r) / (p @ A @ p)
        x, old = x + alpha * p, r
        r = r - alpha * A @ p
        p = r + (r @ r) / (old @ old) * p
        found.append(x)
    return found


def efficiency(M, g, d):
    best = g @ torch.linalg.solve(M, g) / 2
    return ((g @ d - d @ M @ d / 2) / best).item()


def cosine(M, g, d):
    return torch.cosine_similarity(d, torch.linalg.solve(M, g), dim=0).item()


@pytest.mark.parametrize("curvature_batch", [8, 3])
@pytest.mark.parametrize(("name", "blocks"), SPLIT)
def test_converged_it_is_the_exact_step(name, blocks, curvature_batch):
    for one in compared(name, blocks, 400, curvature_batch):
        for metric in STEPS:
            found = one.by(metric)
            assert found.value == pytest.approx(1, abs=1e-8)
            assert found.low <= found.value <= found.high <= 1
            assert found.n == curvature_batch


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(("name", "blocks"), [("mlp", None), ("cnn", [["0", "2"]])])
def test_weight_decay_and_later_steps(name, blocks, decoupled):
    """Coupled, τθ is in the gradient and τ in the damping; decoupled, in neither."""
    given = {"steps": 3, "tau": 0.05, "decoupled_weight_decay": decoupled}
    for one in compared(name, blocks, 400, 5, **given):
        for metric in STEPS:
            assert one.by(metric).value == pytest.approx(1, abs=1e-8)
        if not decoupled:
            undamped = one._replace(damping=LAMBDA)  # τ forgotten
            assert undamped.by(metrics.decrease_efficiency).value < 1 - 1e-6


@pytest.mark.parametrize(("name", "blocks"), SPLIT)
def test_few_iterations_are_worth_what_a_dense_computation_says(name, blocks):
    rising = []
    for k in (1, 2, 5, 30):
        found = compared(name, blocks, k, 5)
        rising.append([one.by(metrics.decrease_efficiency).value for one in found])
        for one in found:
            M = dense(one.truth) + LAMBDA * torch.eye(one.block.d)
            g, d = one.step.gradient, one.step.step
            if k <= 5:  # later, rounding parts two runs of conjugate gradients
                torch.testing.assert_close(conjugate_gradients(M, g, k)[-1], d)
            assert one.by(metrics.decrease_efficiency).value == pytest.approx(
                efficiency(M, g, d), abs=1e-9
            )
            # the length of an iterate from zero is the best along it: d·Md = g·d
            assert one.by(metrics.step_quality).value == pytest.approx(
                efficiency(M, g, d), abs=1e-9
            )
            assert one.by(metrics.step_cosine).value == pytest.approx(cosine(M, g, d), abs=1e-9)
    values = torch.tensor(rising)
    assert (values.diff(dim=0) > -1e-10).all()
    assert (values[0] < 1 - 1e-3).all()
    assert (values[-1] > 1 - 1e-6).all()


def test_intervals_are_those_of_the_same_step_from_a_matrix():
    """Diagonal B with B step = g: another operator that takes the very same step."""
    for one in compared("mlp", [["0"], ["2", "4"]], 3, 5):
        same = one._replace(step=Diagonal(one.step.gradient / one.step.step))
        for metric in STEPS:
            found = one.by(metric)
            expected = metric(one.truth, same.step, one.damping, one.step.gradient, 0.0)
            for end in ("value", "low", "high", "n"):
                assert getattr(found, end) == pytest.approx(getattr(expected, end), rel=1e-9)
            assert found.low < found.value < found.high


def test_a_direction_reversed():
    for one in compared("cnn", [["0", "2"], ["4", "6"]], 400):
        back = one._replace(step=SingleStep(one.step.gradient, -one.step.step))
        assert back.by(metrics.step_cosine).value == pytest.approx(-1, abs=1e-8)
        assert back.by(metrics.decrease_efficiency).value == pytest.approx(-3, abs=1e-8)
        assert back.by(metrics.step_quality).value == pytest.approx(1, abs=1e-8)


@given(seed=st.integers(0, 10_000), d=st.integers(2, 12), damping=st.sampled_from([1e-3, 0.1, 10]))
@settings(max_examples=60, deadline=None)
def test_each_iteration_from_zero_decreases_the_model(seed, d, damping):
    torch.manual_seed(seed)
    root, g = torch.randn(d, d), torch.randn(d)
    C = root @ root.T
    M = C + damping * torch.eye(d)
    values = [
        metrics.decrease_efficiency(Dense(C), SingleStep(g, x), damping, g, 0.0).value
        for x in conjugate_gradients(M, g, d)
        if x.isfinite().all()  # a residual of exact zero: done early
    ]
    assert 0 < values[0] <= 1 + 1e-9
    # the model's decrease is a difference of numbers up to 1/damping of g·d
    assert all(b >= a - 1e-9 for a, b in pairwise(values))
    assert values[-1] > 1 - 1e-4


def test_rho_of_a_direction():
    """Its gradient must be that of the problem: the whole batch, no weight decay."""
    case = CASES["mlp"]()
    problem = problem_of(case, case.batches[0])
    optimizer = hessian_free(case, [["0"], ["2", "4"]], 5)
    optimizer.step(closure_of(optimizer, case, case.batches[0]))
    for block, step in live.taken(optimizer, problem).items():
        same = Diagonal(step.gradient / step.step)
        found, expected = (
            metrics.rho(exact.ggn(problem, block), B, LAMBDA, problem, block, 0.0)
            for B in (step, same)
        )
        assert found.value == pytest.approx(expected.value, rel=1e-9)


def test_what_is_taken_is_a_copy_in_the_precision_of_the_problem():
    case = CASES["mlp"]()
    case.model.float()
    batch = tuple(part.float() for part in case.batches[0])
    problem = problem_of(case, batch, torch.float64)
    optimizer = hessian_free(case, None, 100)
    optimizer.step(closure_of(optimizer, case, batch))
    ((block, step),) = live.taken(optimizer, problem).items()
    assert step.step.dtype == step.gradient.dtype == torch.float64
    before = step.step.clone()
    optimizer.step(closure_of(optimizer, case, batch))
    assert torch.equal(step.step, before)
    one = Compared(block, exact.ggn(problem, block), step, LAMBDA)
    for metric in STEPS:
        assert one.by(metric).value == pytest.approx(1, abs=1e-5)  # float32


def directed(**blocks):
    """An optimizer nobody has heard of."""
    return SimpleNamespace(directions=lambda: blocks)


def test_directions_that_are_not_of_the_problem(classifier):
    parameters = {n: classifier.model.get_parameter(n) for n in classifier.trainable}
    half = {n: p for n, p in parameters.items() if n != "2.bias"}
    with pytest.raises(ValueError, match=r"block 'b' is not of whole layers.*\['2\.bias'\].*'4'\]"):
        live.taken(directed(b=half), classifier)
    with pytest.raises(ValueError, match=r"only one of the two has \['9\.weight'\]"):
        live.taken(directed(b={"9.weight": torch.ones(3, 3)}), classifier)
    wrong = parameters | {"2.weight": torch.ones(4, 6)}
    with pytest.raises(ValueError, match=r"'b' has shape \(4, 6\) for 2\.weight, which has \(4, 5"):
        live.taken(directed(b=wrong), classifier)
    with pytest.raises(ValueError, match="the step holds NaN or Inf"):
        live.taken(directed(b=parameters | {"2.bias": torch.full((4,), math.nan)}), classifier)
    assert live.taken(directed(b={}), classifier) == {}
    with pytest.raises(RuntimeError, match="no direction yet"):
        live.taken(optim.HessianFree(classifier.model.requires_grad_(True)), classifier)


@pytest.mark.parametrize(
    ("gradient", "step"),
    [(torch.ones(3), torch.ones(4)), (torch.ones(3, 1), torch.ones(3, 1)), (torch.ones(()),) * 2],
)
def test_a_pair_that_is_none(gradient, step):
    with pytest.raises(ValueError, match=r"must both be \[d\], not"):
        SingleStep(gradient, step)


def test_nothing_else_is_known_of_a_step():
    g = torch.randn(6)
    step, truth = SingleStep(g, torch.randn(6)), Dense(torch.eye(6))
    assert step.shape == (6, 6)
    assert torch.equal(solve(Damped(step, 0.0), g), step.step)
    for ask in (
        lambda: step @ g,
        lambda: Damped(step, 0.1) @ g,
        lambda: dense(step),
        lambda: diagonal(step),
        lambda: inner(step, truth),
        lambda: metrics.relative_error(truth, step),
        lambda: metrics.secant_consistency(truth, step, gradient=g),
        lambda: metrics.preconditioned_condition(truth, step, 0.1, approximation_damping=0.0),
    ):
        with pytest.raises(TypeError, match=r"the step for one gradient: it has no .*step_cosine"):
            ask()
    with pytest.raises(ValueError, match=r"damping 0\.1 cannot be added.*approximation_damping=0"):
        metrics.step_cosine(truth, step, damping=0.1, gradient=g)
    for other in (2 * g, g.float(), g[:5], torch.stack([g, g], 1)):
        with pytest.raises(ValueError, match=r"another gradient.*gradient=step\.gradient"):
            solve(step, other)


class Autoencoder(nn.Module):
    """Encoder and decoder of two layers each, with a layer of neither between them."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        self.scale = nn.Parameter(torch.ones(2))
        self.decoder = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4))

    def forward(self, x):
        return self.decoder(self.scale * self.encoder(x))


PARTITIONS = [
    [["encoder"], ["decoder"]],
    [["decoder"]],
    [["encoder.0", "decoder.2"], ["decoder.0"]],
    [["encoder.0", "encoder.1"], ["encoder.2", "encoder.1"]],
    [["encoder", "encoder.2"]],
    [[""]],
    [],
    None,
    lambda model: [[name] for name, _ in model.named_children()],
]


def autoencoder():
    x = torch.randn(7, 4)
    return Problem(Autoencoder(), nn.MSELoss(), x, x)


@pytest.mark.parametrize("blocks", PARTITIONS)
def test_groups_are_the_blocks_of_hessian_free(blocks):
    """By name and parameter: the GGN with what couples HessianFree's parts set to zero."""
    problem = autoencoder()
    model = problem.model.requires_grad_(True)
    parts = optim.HessianFree(model, blocks=blocks).parts
    whole, names = problem.group("model", [""]), {p: n for n, p in model.named_parameters()}
    numbers = {names[p]: float(j) for j, part in enumerate(parts) for p in part.parameters}
    owner = whole.join({n: torch.full_like(p, numbers[n]) for p, n in names.items()})
    G = dense(exact.ggn(problem, whole))
    found = approximations.groups(problem, whole, blocks)
    assert isinstance(found, BlockDiagonal)
    assert len(found.blocks) == len(parts)
    torch.testing.assert_close(dense(found), G * (owner[:, None] == owner))
    told = (blocks(model) if callable(blocks) else blocks) if blocks is not None else [[""]]
    groups = {"+".join(entry) or "model": entry for entry in told}
    for part in parts:
        name = part.name
        block = problem.group(name, groups[name]) if name in groups else problem.block(name)
        assert set(block.parameters) == {names[p] for p in part.parameters}
        at = torch.cat([places(whole, member) for member in block.members])
        torch.testing.assert_close(dense(exact.ggn(problem, block)), G[at][:, at])
    if groups:
        found = problem.blocks(by="group", groups=groups)
        assert [block.name for block in found] == [part.name for part in parts][: len(found)]


def places(whole, member):
    """Where a member's entries stand in the whole block."""
    pieces = torch.arange(whole.d).split([m.d for m in whole.members])
    return pieces[whole.members.index(member)]


@pytest.mark.parametrize(
    "blocks",
    [
        [["encoder"], ["encoder.2"]],
        [["encoder", "head"]],
        ["encoder"],
        [["encoder"], []],
        [["encoder.1"]],
    ],
)
def test_what_hessian_free_refuses_groups_refuse(blocks):
    problem = autoencoder()
    with pytest.raises(ValueError, match=r"overlap|head|string|empty|encoder\.1"):
        approximations.groups(problem, problem.group("model", [""]), blocks)
    with pytest.raises(ValueError, match=r"overlap|head|string|empty|encoder\.1"):
        optim.HessianFree(problem.model.requires_grad_(True), blocks=blocks)


def test_a_group_may_name_modules_without_parameters_beside_others():
    problem = autoencoder()
    assert problem.group("half", ["encoder.1", "encoder.2"]).parameters == (
        "encoder.2.weight",
        "encoder.2.bias",
    )
    with pytest.raises(ValueError, match=r"\['encoder\.1'\] hold no parameters; known"):
        problem.group("none", ["encoder.1"])
    with pytest.raises(ValueError, match="no block 'head'"):
        problem.group("none", ["encoder.2", "head"])


@pytest.mark.parametrize("blocks", [[["encoder"], ["decoder"]], [["decoder", "encoder"]], None])
def test_the_blocks_of_directions_are_those_of_the_problem(blocks):
    problem = autoencoder()
    model = Autoencoder()
    model.load_state_dict(problem.model.state_dict())
    optimizer = optim.HessianFree(
        model, damping=LAMBDA, blocks=blocks, likelihood="gaussian", curvature_batch=7
    )
    case = SimpleNamespace(model=model, loss=lambda m, b: 0.5 * (m(b) - b).square().sum() / len(b))
    optimizer.step(closure_of(optimizer, case, problem.inputs))
    taken = live.taken(optimizer, problem)
    given = problem.blocks("group", {"+".join(b): b for b in blocks} if blocks else {"model": [""]})
    if blocks != [["decoder", "encoder"]]:  # there a group has its layers in the order named
        assert set(given) <= set(taken)
    by_name = {block.name: block for block in taken}
    for block in given:
        assert set(by_name[block.name].members) == set(block.members)
    directions = optimizer.directions()
    for block, step in taken.items():
        for name, part in block.split(step.step).items():
            torch.testing.assert_close(part, -directions[block.name][name])
