"""Factored approximations of one layer, dense and from their definitions, on four kinds of layer.

The reference knows nothing of unfolding or hooks on .grad: a layer's inputs by position are the
derivatives of its output w.r.t. its weight, the roots come from Jacobians, one example at a time.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from kronscope.diag import Problem, approximations, dense, exact, metrics, solve, trace
from kronscope.diag.registry import approximation

N = 4


class MeanOverTime(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def made(model, *shape, classes=3, n=N):
    return Problem(model, nn.CrossEntropyLoss(), torch.randn(n, *shape), torch.arange(n) % classes)


def mlp():
    return made(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), 3)


def conv2d():
    convolution = nn.Conv2d(2, 3, (2, 1), padding=(1, 0))
    return made(nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)), 2, 2, 2)


def conv1d():
    convolution = nn.Conv1d(2, 3, 2, bias=False)
    return made(nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)), 2, 4)


def sequence():
    layers = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), MeanOverTime()
    return made(nn.Sequential(*layers), 5, 3)


PROBLEMS = {"mlp": mlp, "conv2d": conv2d, "conv1d": conv1d, "sequence": sequence}
METHODS = ["kfac", "kfac_reduce", "ekfac", "tkfac", "shampoo", "shampoo_squared", "tnt", "eva"]


class Reference(NamedTuple):
    """a [N, T, i] with 1 appended for a bias, roots b [N, k, T, o] and V [N, k, o, i]."""

    a: Tensor
    b: Tensor

    @property
    def V(self) -> Tensor:
        return torch.einsum("nkto,nti->nkoi", self.b, self.a)

    @property
    def matrix(self) -> Tensor:
        flat = self.V.flatten(2).flatten(0, 1)
        return flat.T @ flat / len(self.a)


def reference(problem: Problem, layer: str, of: str) -> Reference:
    found = [_example(problem, layer, of, n) for n in range(problem.n)]
    return Reference(torch.stack([a for a, _ in found]), torch.stack([b for _, b in found]))


def _example(problem, layer, of, n):
    module, x, t = problem.model.get_submodule(layer), problem.inputs[n : n + 1], problem.targets
    seen = []
    handle = module.register_forward_hook(lambda _m, args, z: seen.extend([args[0], z]))
    outputs = problem.model(x)
    handle.remove()
    channels = -1 if isinstance(module, nn.Linear) else 1

    def shifted(shift):
        handle = module.register_forward_hook(lambda _m, _a, z: z + shift)
        try:
            return problem.model(x)
        finally:
            handle.remove()

    by_weight = jacrev(lambda w: functional_call(module, {"weight": w}, seen[0]))(module.weight)
    by_weight = by_weight.movedim(channels if channels == 1 else seen[1].ndim - 1, 0)[0]
    a = by_weight.reshape(-1, *module.weight.shape)[:, 0].flatten(1)  # the first output's own row
    a = a if module.bias is None else torch.cat([a, torch.ones(len(a), 1)], 1)
    J = jacrev(shifted)(torch.zeros_like(seen[1])).reshape(outputs.numel(), *seen[1].shape)
    J = J.movedim(1 + channels if channels == 1 else -1, -1).reshape(len(J), len(a), -1)
    loss = lambda y: problem.loss(y, t[n : n + 1])  # noqa: E731
    if of == "empirical_fisher":
        return a, torch.einsum("c,cto->to", jacrev(loss)(outputs).flatten(), J)[None]
    H = hessian(loss)(outputs).reshape(len(J), len(J))
    values, vectors = torch.linalg.eigh(H)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return a, torch.einsum("kc,cto->kto", root, J)


@pytest.fixture(params=PROBLEMS)
def problem(request):
    return PROBLEMS[request.param]()


OF = pytest.mark.parametrize("of", ["ggn", "empirical_fisher"])


def build(name, problem, of, **keywords):
    return approximation[name].function(problem, problem.block("0"), of=of, **keywords)


def close(found, expected):
    torch.testing.assert_close(dense(found), expected, rtol=1e-9, atol=1e-12)


@OF
def test_the_reference_is_the_truth(problem, of):
    truth = exact.truth(problem, problem.block("0"), of)
    torch.testing.assert_close(reference(problem, "0", of).matrix, dense(truth))


@OF
def test_kfac_and_kfac_reduce(problem, of):
    a, b = reference(problem, "0", of)
    T = a.shape[1]
    assert (T > 1) == (problem.inputs.ndim > 2)
    A = sum(torch.outer(x, x) for row in a for x in row) / N
    G = sum(torch.outer(g, g) for g in b.reshape(-1, b.shape[-1])) / (N * T)
    close(build("kfac", problem, of), torch.kron(G, A))
    pooled, summed = a.mean(1), b.sum(2).flatten(0, 1)
    A = sum(torch.outer(x, x) for x in pooled) / N
    G = sum(torch.outer(g, g) for g in summed) / N
    close(build("kfac_reduce", problem, of), torch.kron(G, A))


@OF
def test_ekfac(problem, of):
    found = reference(problem, "0", of)
    factors = build("kfac", problem, of)
    U, W = (torch.linalg.eigh(factor)[1] for factor in (factors.left, factors.right))
    basis = torch.kron(U, W)
    best = (basis.T @ found.matrix @ basis).diagonal()
    close(build("ekfac", problem, of), basis @ torch.diag(best) @ basis.T)
    positions_first = torch.einsum("nkto,nti->nktoi", found.b @ U, found.a @ W).square()
    apart = positions_first.sum(2).sum(1).mean(0).flatten()
    assert (found.a.shape[1] == 1) == torch.allclose(apart, best)  # squaring before summing differs


@OF
def test_tkfac(problem, of):
    V = reference(problem, "0", of).V.flatten(0, 1) / N**0.5
    left, right = sum(v @ v.T for v in V), sum(v.T @ v for v in V)
    found, truth = build("tkfac", problem, of), exact.truth(problem, problem.block("0"), of)
    close(found, torch.kron(left, right) / left.trace())
    assert trace(found) == pytest.approx(trace(truth), rel=1e-12)


def test_tkfac_as_published_for_one_row_per_example():
    """δ·Ψ⊗Φ, Φ = E[‖g‖² x xᵀ]/δ, Ψ = E[‖x‖² g gᵀ]/δ, δ = E[‖g‖²‖x‖²]."""
    problem = mlp()
    a, b = (t.squeeze() for t in reference(problem, "0", "empirical_fisher"))
    sizes, slopes = a.square().sum(1), b.square().sum(1)
    delta = (sizes * slopes).mean()
    right = (a.T * slopes) @ a / N / delta
    left = (b.T * sizes) @ b / N / delta
    close(build("tkfac", problem, "empirical_fisher"), delta * torch.kron(left, right))


def test_tkfac_refuses_a_trace_of_nothing():
    """Second derivatives 2 and -2 in turn, at inputs of one size: the trace cancels, no more."""
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    signs = torch.tensor([[1.0], [-1.0]])
    problem = Problem(
        nn.Sequential(nn.Linear(2, 1, bias=False)),
        lambda z, t: (t * z.square()).mean(),
        inputs,
        signs,
    )
    with pytest.raises(ValueError, match=r"tkfac divides by the trace of the hessian of block '0'"):
        build("tkfac", problem, "hessian")


@pytest.mark.parametrize("name", METHODS)
def test_no_curvature_gives_zero_and_not_nan(name):
    """A loss linear in the outputs has no GGN, one that ignores them no gradient either."""
    for slope in (0.0, 1.0):
        layers = nn.Linear(2, 3), nn.Linear(3, 1)
        loss = lambda z, t, slope=slope: (slope * z + t + 0 * z.square()).mean()  # noqa: E731
        problem = Problem(nn.Sequential(*layers), loss, torch.randn(2, 2), torch.ones(2, 1))
        if name != "eva":
            assert dense(build(name, problem, "ggn")).abs().max() == 0
        if slope == 0:
            found = dense(build(name, problem, "empirical_fisher"))
            expected = 0.03 * torch.eye(len(found)) if name == "eva" else torch.zeros_like(found)
            torch.testing.assert_close(found, expected)


def linear_network(head):
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), *head)


def test_kfac_is_exact_where_every_position_has_its_own_error():
    """Without the 1/|T| in G it would be |T| = 5 times too large."""
    model = linear_network([])
    problem = Problem(model, nn.MSELoss(), torch.randn(N, 5, 3), torch.randn(N, 5, 2))
    for block in problem.blocks():
        truth = exact.ggn(problem, block)
        close(approximations.kfac(problem, block), dense(truth))
        assert metrics.relative_error(truth, approximations.kfac_reduce(problem, block)).value > 0.1


def test_kfac_reduce_is_exact_where_positions_are_averaged_before_one_error():
    """Without the mean over positions in A it would be |T|² = 25 times too large."""
    model = linear_network([MeanOverTime()])
    problem = Problem(model, nn.MSELoss(), torch.randn(N, 5, 3), torch.randn(N, 2))
    for block in problem.blocks():
        truth = exact.ggn(problem, block)
        close(approximations.kfac_reduce(problem, block), dense(truth))
        assert metrics.relative_error(truth, approximations.kfac(problem, block)).value > 0.1


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_a_mean_over_examples(problem, name):
    """Every example twice: gradients of a mean loss halve, what is made of them must not."""
    twice = Problem(
        problem.model.requires_grad_(True),
        problem.loss,
        problem.inputs.repeat_interleave(2, 0),
        problem.targets.repeat_interleave(2, 0),
    )
    of = "empirical_fisher"
    close(build(name, twice, of), dense(build(name, problem, of)))
    if name in ("shampoo", "tnt", "shampoo_squared"):  # minibatches of equal examples
        size = {"shampoo": 1, "tnt": 2, "shampoo_squared": 2}[name]
        close(build(name, twice, of, batch=2), size * dense(build(name, problem, of)))


def test_eva(problem):
    """Its inverse is the published step; ḡ is of the per-example loss."""
    a, b = reference(problem, "0", "empirical_fisher")
    x, g = a.mean((0, 1)), b.mean((0, 1, 2))
    found, v = build("eva", problem, "empirical_fisher", damping=0.2), torch.randn(len(g), len(x))
    close(found, 0.2 * torch.eye(v.numel()) + torch.kron(torch.outer(g, g), torch.outer(x, x)))
    share = (g @ v @ x) / (x.square().sum() * g.square().sum() + 0.2)
    step = (v - share * torch.outer(g, x)) / 0.2
    torch.testing.assert_close(solve(found, v.flatten()), step.flatten())


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 5),
    kernel=st.integers(1, 3),
    channels=st.integers(1, 3),
    of=st.sampled_from(["ggn", "fisher", "empirical_fisher"]),
)
@settings(max_examples=10, deadline=None)
def test_inequalities_on_convolutions(seed, n, kernel, channels, of):
    torch.manual_seed(seed)
    convolution = nn.Conv1d(2, channels, kernel, bias=bool(seed % 2))
    model = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
    model(torch.randn(1, 2, 4))
    problem = made(model, 2, 4, n=n)
    truth = exact.truth(problem, problem.block("0"), of)

    def error(name):
        return metrics.relative_error(truth, build(name, problem, of)).value

    slack = 1e-7  # the root of rounding in a difference of squares
    assert error("ekfac") <= error("kfac") + slack
    assert (
        error("best_kronecker") <= min(error("kfac"), error("tkfac"), error("kfac_reduce")) + slack
    )
    assert trace(build("tkfac", problem, of)) == pytest.approx(trace(truth), rel=1e-10)


@pytest.mark.parametrize("name", METHODS)
def test_refusals(name):
    problem = sequence()
    group = problem.group("both", ["0", "2"])
    with pytest.raises(ValueError, match=f"{name} needs a Linear layer.*'both'"):
        approximation[name].function(problem, group)
    message = (
        "eva needs gradients with labels"
        if name == "eva"
        else f"{name} needs .* hessian of block '0'"
    )
    with pytest.raises(ValueError, match=message):
        build(name, problem, "hessian")
    if name == "eva":
        with pytest.raises(ValueError, match=r"damping must be positive, not 0\.0"):
            build(name, problem, "empirical_fisher", damping=0.0)
