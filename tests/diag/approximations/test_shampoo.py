"""Shampoo, its square and TNT: dense, from the gradients of single examples and of minibatches."""

from math import prod

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from kronscope.diag import KroneckerSum, Problem, approximations, dense, exact, trace
from kronscope.diag.approximations._variables import power


class MeanOverTime(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (3,)


def convolution():
    layers = nn.Conv2d(2, 3, (2, 1), padding=(1, 0)), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
    return nn.Sequential(*layers), (2, 2, 2)


def sequence():
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 3), MeanOverTime()), (
        5,
        3,
    )


MODELS = {"mlp": mlp, "convolution": convolution, "sequence": sequence}


@pytest.fixture(params=MODELS)
def problem(request):
    model, shape = MODELS[request.param]()
    return Problem(
        model, nn.CrossEntropyLoss(), torch.randn(6, *shape), torch.tensor([0, 1, 2, 1, 1, 0])
    )


def gradients(problem: Problem, of: str) -> dict[str, Tensor]:
    """{weight, bias: [N, k, *shape]}: each example's gradient, or columns of its GGN's root."""
    names = dict(problem.model[0].named_parameters())
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for x, t in zip(problem.inputs.split(1), problem.targets.split(1), strict=True):

        def outputs(tensors, x=x):
            return functional_call(problem.model, {f"0.{n}": w for n, w in tensors.items()}, (x,))[
                0
            ]

        def loss(z, t=t):
            return problem.loss(z[None], t)

        z, J = outputs(names), jacrev(outputs)(names)
        if of == "empirical_fisher":
            root = jacrev(loss)(z)[None]
        else:
            values, vectors = torch.linalg.eigh(hessian(loss)(z))
            root = (vectors * values.clamp(min=0).sqrt()).T
        for name in names:
            found[name].append(torch.tensordot(root, J[name], 1))
    return {name: torch.stack(each) for name, each in found.items()}


def minibatches(problem: Problem, of: str, batch: int) -> dict[str, Tensor]:
    """{weight, bias: [s, *shape]}: gradients whose mean outer product is E[vec ĝ vec ĝᵀ]."""
    own = gradients(problem, of)
    if of == "empirical_fisher":
        return {name: g[:, 0].unflatten(0, (-1, batch)).mean(1) for name, g in own.items()}
    k = own["weight"].shape[1]  # independent, of mean zero: the second moment is C / batch
    return {name: (k / batch) ** 0.5 * g.flatten(0, 1) for name, g in own.items()}


def contraction(g: Tensor, axis: int) -> Tensor:
    """E[ĝ contracted with itself over all axes but one] for [s, n_1, ..., n_k]."""
    rows = g.movedim(axis + 1, 1).reshape(len(g), g.shape[axis + 1], -1)
    return (rows @ rows.mT).mean(0)


def contraction_root(g: Tensor, axis: int, p: int) -> Tensor:
    """The same to the power 1/p, from singular values: their squares need not be told from zero."""
    rows = g.movedim(axis + 1, 0).flatten(1) / len(g) ** 0.5
    U, s, _ = torch.linalg.svd(rows, full_matrices=False)
    return (U * s.where(s > 1e-12 * s[0], 0).pow(2 / p)) @ U.T


def beside(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Weight matrix and bias matrix, the entries counted row by row of [W, b]."""
    if bias is None:
        return weight
    out = len(bias)
    width = len(weight) // out
    order = torch.cat(
        [
            torch.arange(out * (width + 1)).reshape(out, -1)[:, :width].flatten(),
            torch.arange(width, out * (width + 1), width + 1),
        ]
    )
    found = torch.zeros(len(order), len(order))
    found[order[:, None], order] = torch.block_diag(weight, bias)
    return found


CASES = pytest.mark.parametrize(
    ("of", "batch"), [("empirical_fisher", 1), ("empirical_fisher", 3), ("ggn", 1), ("ggn", 2)]
)


def axes_of(g: Tensor) -> Tensor:
    """A convolution's weight as (O, I, kh·kw), anything else as it is."""
    return g.flatten(3) if g.ndim > 3 else g


@CASES
def test_shampoo(problem, of, batch):
    seen = minibatches(problem, of, batch)
    weight = axes_of(seen["weight"])
    k = weight.ndim - 1
    assert k == (3 if isinstance(problem.model[0], nn.Conv2d) else 2)
    product = torch.ones(1, 1)
    for axis in range(k):
        product = torch.kron(product, contraction_root(weight, axis, 2 * k))
    bias = contraction_root(seen["bias"], 0, 2) if "bias" in seen else None
    found = approximations.shampoo(problem, problem.block("0"), of=of, batch=batch)
    assert isinstance(found, KroneckerSum)
    # 1e-7: a sixth root's digits where an eigenvalue is 1e-10 of the largest
    torch.testing.assert_close(dense(found), beside(product, bias), rtol=1e-9, atol=1e-7)


@CASES
def test_shampoo_squared(problem, of, batch):
    seen = minibatches(problem, of, batch)
    matrix = seen["weight"].flatten(2)
    left, right = contraction(matrix, 0), contraction(matrix, 1)
    bias = batch * contraction(seen["bias"], 0) if "bias" in seen else None
    expected = beside(batch * torch.kron(left, right) / left.trace(), bias)
    found = approximations.shampoo_squared(problem, problem.block("0"), of=of, batch=batch)
    torch.testing.assert_close(dense(found), expected, rtol=1e-9, atol=1e-13)
    if of == "ggn":  # the batch leaves no trace in it, and its trace is the truth's
        truth = exact.truth(problem, problem.block("0"), of)
        assert trace(found) == pytest.approx(trace(truth), rel=1e-10)


def test_shampoo_squared_is_a_step_of_the_power_iteration(problem):
    """L and R are the rearranged truth times the identity: one step to its singular vectors."""
    block = problem.block("0.weight")
    o, i = problem.block("0").members[0].shapes[0][0], prod(problem.model[0].weight.shape[1:])
    tiles = dense(exact.empirical_fisher(problem, block)).reshape(o, i, o, i)
    left = torch.einsum("oipj,ij->op", tiles, torch.eye(i))
    right = torch.einsum("oipj,op->ij", tiles, torch.eye(o))
    found = approximations.shampoo_squared(problem, block)
    torch.testing.assert_close(dense(found), torch.kron(left, right) / left.trace())
    torch.testing.assert_close(
        dense(approximations.tkfac(problem, block, of="empirical_fisher")), dense(found)
    )


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_shampoo_is_the_square_root_of_a_second_moment_of_means(problem, batch):
    """Its scale: B ∝ batch^-½; the trace of L and R is that of E[vec ĝ vec ĝᵀ] = C / batch.

    tr(B²) is never below that trace, as tr L^½ tr R^½ >= (tr L tr R)^½: an over-sized square.
    """
    block = problem.block("0.weight")
    one = approximations.shampoo(problem, block, of="ggn")
    several = approximations.shampoo(problem, block, of="ggn", batch=batch)
    torch.testing.assert_close(batch**0.5 * dense(several), dense(one), rtol=1e-9, atol=1e-9)
    moment = trace(exact.ggn(problem, block)) / batch
    assert torch.linalg.matrix_power(dense(several), 2).trace() >= moment * (1 - 1e-9)


def test_minibatches_of_random_examples_mix_in_the_mean_gradient():
    """All pairs of 4 examples in turn, as if drawn at random: 2 E[ĝ ĝᵀ] = F + ∇ ∇ᵀ."""
    model, shape = mlp()
    x, t = torch.randn(4, *shape), torch.tensor([0, 1, 2, 1])
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flatten()
    four, all_pairs = (
        Problem(model, nn.CrossEntropyLoss(), x[rows], t[rows]) for rows in (torch.arange(4), pairs)
    )
    block = four.block("0.bias")
    gradient = four.gradient(block)
    expected = dense(exact.empirical_fisher(four, block)) + torch.outer(gradient, gradient)
    found = approximations.shampoo_squared(all_pairs, block, batch=2)
    torch.testing.assert_close(dense(found), expected)
    weight = four.block("0.weight")
    gradient = four.gradient(weight)
    moment = dense(exact.empirical_fisher(four, weight)) + torch.outer(gradient, gradient)
    left = torch.einsum("oipi->op", moment.reshape(4, 3, 4, 3))
    found = approximations.shampoo_squared(all_pairs, weight, batch=2)
    torch.testing.assert_close(found.left[0] * found.right[0].trace(), left)


@CASES
def test_tnt(problem, of, batch):
    """U_i have one mean eigenvalue; their product has the trace of batch · E[vec ĝ vec ĝᵀ]."""
    seen = minibatches(problem, of, batch)
    weight = axes_of(seen["weight"])
    axes = [contraction(weight, axis) for axis in range(weight.ndim - 1)]
    sizes, total = [len(H) for H in axes], axes[0].trace()
    c = (total / prod(sizes)) ** (1 / len(axes))
    product = torch.ones(1, 1)
    for j, H in enumerate(axes):
        others = prod(sizes[:j] + sizes[j + 1 :])
        U = H / (c ** (len(axes) - 1) * others)
        assert torch.linalg.eigvalsh(U).mean().item() == pytest.approx(c.item(), rel=1e-12)
        product = torch.kron(product, U)
    assert product.trace().item() == pytest.approx(total.item(), rel=1e-12)
    bias = batch * contraction(seen["bias"], 0) if "bias" in seen else None
    found = approximations.tnt(problem, problem.block("0"), of=of, batch=batch)
    torch.testing.assert_close(dense(found), beside(batch * product, bias), rtol=1e-9, atol=1e-13)
    if weight.ndim == 3:  # on a matrix with the same labels it is Shampoo's square
        squared = approximations.shampoo_squared(problem, problem.block("0"), of=of, batch=batch)
        torch.testing.assert_close(dense(found), dense(squared))


def test_tnt_of_sampled_labels_is_on_the_fishers_scale():
    """Minibatches of two examples, 4,000 of them: without the factor 2 it would be half as large.

    The sampled trace has a standard error of about 2 %.
    """
    model, shape = mlp()
    x = torch.randn(2, *shape).repeat(4000, 1)
    problem = Problem(model, nn.CrossEntropyLoss(), x, torch.zeros(8000, dtype=torch.long))
    block = problem.block("0")
    expected = dense(approximations.tnt(problem, block))
    sampled = dense(approximations.tnt(problem, block, of="fisher_mc", batch=2))
    assert (sampled.trace() / expected.trace()).item() == pytest.approx(1, abs=0.1)
    assert ((sampled - expected).norm() / expected.norm()).item() < 0.1
    truth = exact.fisher(problem, block)
    assert expected.trace().item() == pytest.approx(trace(truth), rel=1e-10)


@pytest.mark.parametrize("problem", ["mlp", "convolution"], indirect=True)
def test_weight_and_bias_do_not_couple(problem):
    block = problem.block("0")
    width = block.single.matrix_shape[1]
    for name in ("shampoo", "shampoo_squared", "tnt"):
        matrix = dense(getattr(approximations, name)(problem, block))
        bias = torch.arange(block.d) % width == width - 1
        assert matrix[bias][:, ~bias].abs().max() == 0
        assert matrix[bias][:, bias].abs().max() > 0


@pytest.mark.parametrize("name", ["shampoo", "shampoo_squared", "tnt"])
@pytest.mark.parametrize("batch", [0, 4, 12])
def test_a_batch_that_does_not_divide_the_examples(problem, name, batch):
    with pytest.raises(ValueError, match=rf"{name}: batch={batch} .* 6 examples .*\[1, 2, 3, 6\]"):
        getattr(approximations, name)(problem, problem.block("0"), batch=batch)


def test_power_of_a_semidefinite_matrix():
    half = torch.randn(5, 2)
    H = half @ half.T
    torch.testing.assert_close(torch.linalg.matrix_power(power(H, 1 / 3), 3), H)
    null = torch.linalg.eigvalsh(power(H, 1 / 6))[:3]
    assert null.abs().max() < 1e-12  # (1e-16)^⅙ would be 2e-3
