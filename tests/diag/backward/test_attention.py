"""Attention: what PyTorch's fused kernels cannot differentiate is computed by the formula."""

import pytest
import torch
from torch import nn

from kronscope.diag import Problem, approximations, dense, exact, metrics
from kronscope.diag.backward.products import dense_block
from kronscope.diag.truths.matrix_free import MatrixFree


class Attending(nn.Module):
    """Two heads by scaled_dot_product_attention; `wide` outputs."""

    def __init__(self, wide):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(12, wide)

    def forward(self, x):
        heads = self.qkv(x).unflatten(2, (6, 2)).transpose(1, 2)  # [n, 6, T, 2]
        y = nn.functional.scaled_dot_product_attention(*heads.chunk(3, 1))
        return self.out(y.transpose(1, 2).flatten(1))


def encoder(wide):
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(4, 4), layer, nn.Flatten(), nn.Linear(12, wide))


def problem(model, wide):
    x, t = torch.randn(5, 3, 4), torch.randint(wide, (5,))
    return Problem(model(wide).eval(), nn.CrossEntropyLoss(), x, t)


@pytest.fixture
def switches():
    """The global choice of kernels is left as it was."""

    def state():
        attention = torch.backends.cuda
        return (
            torch.backends.mha.get_fastpath_enabled(),
            attention.flash_sdp_enabled(),
            attention.mem_efficient_sdp_enabled(),
            attention.math_sdp_enabled(),
        )

    before = state()
    yield
    assert state() == before


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("model", [Attending, encoder])
@pytest.mark.parametrize("of", exact.TRUTHS)
def test_every_block_has_every_truth(model, of):
    own = problem(model, 2)
    for block in own.blocks():
        expected = dense_block(own, block, of, 1, torch.Generator().manual_seed(0))
        found = dense(exact.truth(own, block, of))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.max()))


def test_hessian_equals_torch_func(by_autograd):
    own = problem(Attending, 2)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = by_autograd(own, "qkv")
    torch.testing.assert_close(dense(exact.hessian(own, own.block("qkv"))), expected)


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("of", ["hessian", "ggn"])
def test_products_when_they_are_asked_for(monkeypatch, of):
    own = problem(encoder, 2)
    block = own.group("all", [""])
    matrix = dense_block(own, block, of, 1, None)
    monkeypatch.setattr(exact, "DENSE_UP_TO", 0)
    own.budget = 0
    truth = exact.truth(own, block, of)
    assert isinstance(truth, MatrixFree)
    v = torch.randn(block.d, 2)
    torch.testing.assert_close(truth @ v, matrix @ v)


@pytest.mark.parametrize("model", [Attending, encoder])
def test_rho(model):
    own = problem(model, 2)
    for block in own.blocks():
        truth, approximation = exact.ggn(own, block), approximations.diagonal(own, block)
        found = metrics.rho(truth, approximation, 1.0, problem=own, block=block)
        assert found.low < found.value < found.high


@pytest.mark.parametrize("model", [Attending, encoder])
def test_many_roots_at_once(model):
    """More roots than are passed back one by one."""
    own = problem(model, 20)
    block = own.blocks()[0]
    expected = dense_block(own, block, "ggn", 1, None)
    torch.testing.assert_close(dense(exact.ggn(own, block)), expected)
