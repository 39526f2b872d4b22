"""Mini-blocks of every kind of layer against sub-blocks of the dense truth and of gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kronscope.diag import Problem, approximations, dense, exact, metrics, solve
from kronscope.diag.operators import Damped
from kronscope.diag.registry import approximation

ANY = ("mini_block", "mini_block_shared", "mini_block_input", "mini_block_input_shared")
KERNEL = ("mini_block_kernel", "mini_block_kernel_shared")
TRUTHS = ("ggn", "fisher", "empirical_fisher", "hessian")


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def made(layer, *shape):
    """A tanh network of the layer and one Linear layer, 5 examples in 3 classes."""
    inputs = torch.randn(5, *shape)
    rest = [nn.Tanh(), Mean() if isinstance(layer, nn.Linear) and len(shape) > 1 else nn.Flatten()]
    width = nn.Sequential(layer, *rest)(inputs).shape[1]
    model = nn.Sequential(layer, *rest, nn.Linear(width, 3))
    return Problem(model, nn.CrossEntropyLoss(), inputs, torch.arange(5) % 3)


CONVOLUTIONS = {
    "conv1d": lambda: made(nn.Conv1d(2, 3, 3, dilation=2, bias=False), 2, 7),
    "conv2d": lambda: made(nn.Conv2d(2, 3, (2, 3), padding=1, stride=2), 2, 4, 4),
    "conv2d 1x1": lambda: made(nn.Conv2d(3, 2, 1), 3, 2, 2),
    "conv2d groups": lambda: made(nn.Conv2d(4, 6, 2, groups=2), 4, 3, 3),
    "conv2d depthwise": lambda: made(nn.Conv2d(3, 3, 2, groups=3, bias=False), 3, 3, 3),
    "conv3d": lambda: made(nn.Conv3d(2, 2, 2), 2, 2, 3, 2),
}
LAYERS = {
    "linear": lambda: made(nn.Linear(4, 3), 4),
    "linear, no bias": lambda: made(nn.Linear(4, 3, bias=False), 4),
    "sequence": lambda: made(nn.Linear(4, 3), 6, 4),
    **CONVOLUTIONS,
}


def shared(matrix, mask, axis, shape):
    """The masked matrix with its blocks replaced by their mean over outputs (0) or inputs (1)."""
    o, i = shape
    tiles = (matrix * mask).reshape(o, i, o, i)
    if axis == 0:
        mean = torch.stack([tiles[k, :, k, :] for k in range(o)]).mean(0)
        return torch.kron(torch.eye(o), mean)
    mean = torch.stack([tiles[:, k, :, k] for k in range(i)]).mean(0)
    return torch.kron(mean, torch.eye(i))


def masks(problem, block):
    """{partition: 1 where two entries of [W, b] belong to one mini-block}."""
    shape = block.single.matrix_shape
    row = torch.arange(shape[0])[:, None].expand(shape).reshape(-1)
    column = torch.arange(shape[1])[None].expand(shape).reshape(-1)
    weight = problem.model.get_submodule(block.name).weight
    kernel = weight[0, 0].numel()
    ids = {"output": row, "input": column}
    if weight.ndim > 2:
        ids["kernel"] = row * shape[1] + column // kernel  # a bias, last, starts its own slice
    return {name: (own[:, None] == own[None]).to(weight) for name, own in ids.items()}


@pytest.mark.parametrize("of", TRUTHS)
@pytest.mark.parametrize("name", LAYERS)
def test_blocks_are_those_of_the_dense_truth(name, of):
    problem = LAYERS[name]()
    block = problem.block("0")
    shape = block.single.matrix_shape
    matrix, mask = dense(exact.truth(problem, block, of)), masks(problem, block)

    def check(method, expected):
        found = approximation[method].function(problem, block, of=of)
        torch.testing.assert_close(dense(found), expected, rtol=1e-10, atol=1e-14)

    check("mini_block", matrix * mask["output"])
    check("mini_block_shared", shared(matrix, mask["output"], 0, shape))
    check("mini_block_input", matrix * mask["input"])
    check("mini_block_input_shared", shared(matrix, mask["input"], 1, shape))
    if name in CONVOLUTIONS:
        check("mini_block_kernel", matrix * mask["kernel"])
        check("mini_block_kernel_shared", shared(matrix, mask["kernel"], 0, shape))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_kernel_slices_of_the_empirical_fisher_are_moments_of_gradient_slices(name):
    """mean_n d dᵀ with d the slice of example n's own gradient, by autograd, one at a time."""
    problem = CONVOLUTIONS[name]()
    block, layer = problem.block("0"), problem.model[0]
    (o, i), size = block.single.matrix_shape, layer.weight[0, 0].numel()
    expected = torch.zeros(o, i, o, i)
    for x, t in zip(problem.inputs, problem.targets, strict=True):
        parameters = [p.detach().requires_grad_() for p in layer.parameters()]
        named = dict(zip(("0.weight", "0.bias"), parameters, strict=False))
        out = torch.func.functional_call(problem.model, named, (x[None],))
        grads = torch.autograd.grad(problem.loss(out, t[None]), parameters)
        gradient = torch.cat([g.reshape(o, -1) for g in grads], 1)
        for row in range(o):
            for start in range(0, i, size):
                part = slice(start, start + size)  # the bias, last, is a slice of one
                d = gradient[row, part]
                expected[row, part, row, part] += torch.outer(d, d) / problem.n
    found = approximations.mini_block_kernel(problem, block, of="empirical_fisher")
    expected = expected.reshape(o * i, o * i)
    torch.testing.assert_close(dense(found), expected, rtol=1e-10, atol=1e-14)


def test_kernel_slices_are_contiguous_and_biases_alone():
    problem = CONVOLUTIONS["conv2d"]()
    found = approximations.mini_block_kernel(problem, problem.block("0"))
    assert [len(part) for part in found.blocks] == [6, 6, 1] * 3
    assert found.order is None
    bare = CONVOLUTIONS["conv1d"]()
    assert approximations.mini_block_kernel(bare, bare.block("0")).blocks.shape == (6, 3, 3)


def test_one_kernel_per_output_is_all_of_a_linear_convolution():
    """Squared error of one input channel without bias: C = (2/c) mean Σ_t patch patchᵀ ⊗ I."""
    model = nn.Sequential(nn.Conv2d(1, 3, 2, bias=False))
    problem = Problem(model, nn.MSELoss(), torch.randn(4, 1, 3, 3), torch.randn(4, 3, 2, 2))
    block = problem.block("0")
    truth = exact.ggn(problem, block)
    for name in KERNEL:
        found = approximation[name].function(problem, block)
        torch.testing.assert_close(dense(found), dense(truth), rtol=1e-10, atol=1e-14)
        # the root of a difference of squares
        assert metrics.relative_error(truth, found).value < 1e-7


@given(
    seed=st.integers(0, 10_000),
    channels=st.integers(1, 3),
    out=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bias=st.booleans(),
    of=st.sampled_from(["ggn", "empirical_fisher"]),
)
@settings(max_examples=10, deadline=None)
def test_finer_blocks_are_never_better(seed, channels, out, kernel, bias, of):
    torch.manual_seed(seed)
    problem = made(nn.Conv2d(channels, out, kernel, bias=bias), channels, 2, 3)
    block = problem.block("0")
    truth = exact.truth(problem, block, of)

    def error(name):
        found = approximation[name].function(problem, block, of=of)
        return metrics.relative_error(truth, found).value

    slack = 1e-7  # the root of rounding in a difference of squares
    assert error("mini_block") <= error("mini_block_kernel") + slack
    assert error("mini_block_kernel") <= error("diagonal") + slack
    assert error("mini_block_kernel") <= error("mini_block_kernel_shared") + slack
    assert error("mini_block_input") <= error("mini_block_input_shared") + slack
    assert error("mini_block_input") <= error("diagonal") + slack


@pytest.mark.parametrize("name", LAYERS)
def test_they_solve_and_measure_as_their_dense_form(name):
    problem = LAYERS[name]()
    block = problem.block("0")
    truth, v = exact.ggn(problem, block), torch.randn(block.d)
    for method in ANY + (KERNEL if name in CONVOLUTIONS else ()):
        found = approximation[method].function(problem, block)
        matrix = dense(found)
        torch.testing.assert_close(found @ v, matrix @ v)
        damped = matrix + 0.1 * torch.eye(block.d)
        torch.testing.assert_close(solve(Damped(found, 0.1), v), torch.linalg.solve(damped, v))
        error = (dense(truth) - matrix).norm() / dense(truth).norm()
        assert metrics.relative_error(truth, found).value == pytest.approx(error.item(), abs=1e-7)


def test_units_of_a_layer():
    problem = LAYERS["linear"]()
    unit = problem.block("0[1]")
    whole = dense(exact.ggn(problem, unit))
    torch.testing.assert_close(dense(approximations.mini_block(problem, unit)), whole)
    torch.testing.assert_close(dense(approximations.mini_block_shared(problem, unit)), whole)
    diagonal = torch.diag(whole.diagonal())
    torch.testing.assert_close(dense(approximations.mini_block_input(problem, unit)), diagonal)


def test_refusals(classifier):
    group = classifier.group("both", ["0", "2"])
    for name in ANY:
        with pytest.raises(ValueError, match=f"{name} needs a Linear layer or a conv.*'both'"):
            approximation[name].function(classifier, group)
    normed = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))
    problem = Problem(normed, nn.CrossEntropyLoss(), torch.randn(5, 4), torch.arange(5) % 3)
    for name in ANY:
        with pytest.raises(ValueError, match=f"{name} needs.*'0' is \\(a part of\\) LayerNorm"):
            approximation[name].function(problem, problem.block("0"))
    convolution = CONVOLUTIONS["conv2d"]()
    for name in KERNEL:
        for block in classifier.block("0"), group:
            with pytest.raises(ValueError, match=f"{name} needs a convolution.*'{block.name}'"):
                approximation[name].function(classifier, block)
        for part in ("0.bias", "0[1,0]"):
            with pytest.raises(ValueError, match=f"{name} needs a convolution and all kernels"):
                approximation[name].function(convolution, convolution.block(part))
