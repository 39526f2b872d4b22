"""How HessianFree multiplies with Jacobians: by what the layers allow."""

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kronscope import optim
from kronscope.optim.methods.hessian_free.gauss_newton import GaussNewton
from kronscope.optim.methods.hessian_free.jacobians import (
    ROUTES,
    DoubleBackward,
    ForwardMode,
    Linearised,
    Piece,
)
from tests.optim.cases import batches, closure_of, weights
from tests.optim.methods.hessian_free.cases import (
    Between,
    both,
    counts,
    every,
    flat,
    make,
)


class Once(torch.autograd.Function):
    """The tangens hyperbolicus without a second derivative, but with a forward-mode one."""

    @staticmethod
    def forward(x):
        return x.tanh()

    @staticmethod
    def setup_context(ctx, _, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)

    @staticmethod
    def jvp(ctx, v):
        (y,) = ctx.saved_tensors
        return v * (1 - y * y)


class Detached(Once):
    """The same, whose second derivative is there and wrong."""

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g.detach() * (1 - y * y)


class Neither(torch.autograd.Function):
    """Only one derivative."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class Wrapping(nn.Module):
    """Circular padding is lost by PyTorch's tracing: only plain forward mode is left."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(1)
        self.one = nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular")
        self.two, self.function = nn.Linear(9, 2), function

    def forward(self, x):
        return self.two(self.function(self.one(x.view(-1, 2, 3))).flatten(1))


def trained(model, blocks, data=None, **settings):
    torch.manual_seed(3)
    opt = make(model, blocks, "gaussian", **settings)
    for x in data or batches(4):
        opt.step(closure_of(opt, model, x, lambda model, x: 0.5 * model(x).square().sum(1).mean()))
    return opt


@pytest.mark.parametrize(
    ("network", "function", "route", "blocks"),
    [
        (Between, Once.apply, Linearised, []),
        (Between, Detached.apply, Linearised, None),
        (Wrapping, Once.apply, ForwardMode, None),
        (Wrapping, Detached.apply, ForwardMode, []),
    ],
)
def test_another_route_leads_to_the_same(network, function, route, blocks):
    model, plain = network(function), network(torch.tanh)
    opt, usual = (trained(one, blocks, batches(3)) for one in (model, plain))
    assert (opt.route, usual.route) == (route, DoubleBackward)
    assert opt.summary().endswith(f"curvature products by {route.route}")
    assert usual.summary().endswith("curvature products by double backward")
    # products in another order
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("function", "blocks"), [(Once.apply, []), (torch.tanh, None)])
def test_dropout_masks_are_the_same_by_all_routes(function, blocks):
    ends = []
    for made in (function, torch.tanh):
        model = Between(lambda x, made=made: F.dropout(made(x), 0.4))
        trained(model, blocks, batches(2), curvature_batch=16)
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-12)
    x, v = batches(1)[0], [torch.ones_like(p) for p in model.parameters()]
    found = []
    for route in ROUTES:
        torch.manual_seed(6)
        G = GaussNewton([Piece(model, 16, (x,))], [list(model.parameters())], "gaussian", route)
        found += [flat(G.products([0], [v])[0]) for _ in range(2)]
    for product in found[1:]:
        torch.testing.assert_close(product, found[0])


def test_a_route_that_is_right_by_luck_is_not_taken():
    """Tracing reads memory that nobody wrote, where an earlier pass may have left what is due."""
    for _ in range(3):
        assert trained(Wrapping(Detached.apply), None, batches(1)).route is ForwardMode
    assert torch.get_deterministic_debug_mode() == 0


@both
def test_a_layer_without_either_derivative(blocks):
    model = Between(Neither.apply)
    before = weights(model)
    with pytest.raises(ValueError, match="outputs of Between cannot be differentiated") as said:
        trained(model, blocks)
    for route in ROUTES:
        assert f"{route.route}: " in str(said.value)
    assert "layers need a second derivative or a forward-mode one" in str(said.value)
    assert torch.equal(weights(model), before)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(1)
        self.cell, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 2)

    def forward(self, x):
        q, k, v = self.qkv(x).view(len(x), 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.head(mixed).mean(1)


@both
@pytest.mark.parametrize(("kind", "dtype"), [(nn.LSTM, torch.float32), (nn.GRU, torch.float64)])
def test_recurrent_layers(blocks, kind, dtype):
    model, x = Recurrent(kind).to(dtype), torch.randn(8, 5, 3, dtype=dtype)
    before = weights(model)
    opt = trained(model, blocks, [x] * 4, damping=1.0)
    assert counts(opt) == {"steps": {part.name: 4 for part in opt.parts}}
    assert model(x).square().sum() < 0.5 * Recurrent(kind).to(dtype)(x).square().sum()
    assert not torch.equal(weights(model), before)


@every
def test_fused_attention_gives_way_to_the_plain_one(method, blocks):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(40, 2))
    x = torch.randn(8, 5, 8)
    for one in (model, Attention()):
        first = one(x).square().sum().item()
        opt = trained(one, blocks, [x] * 4, damping=3.0, method=method)
        assert opt.route is DoubleBackward
        assert one(x).square().sum().item() < 0.7 * first
    forward = Attention()  # its products run through the layer anew
    patched = trained(forward, blocks, [x] * 2)
    forward.load_state_dict(Attention().state_dict())
    twin = Attention()
    for model, route in ((forward, ForwardMode), (twin, DoubleBackward)):
        patched = make(model, blocks, "gaussian")
        patched.route = route
        loss = lambda model, x: 0.5 * model(x).square().sum(1).mean()  # noqa: E731
        torch.manual_seed(3)
        patched._generator.manual_seed(5)
        patched.step(closure_of(patched, model, x, loss))
    torch.testing.assert_close(weights(forward), weights(twin), rtol=1e-10, atol=1e-12)


def test_a_layer_that_vmap_does_not_allow():
    with pytest.raises(RuntimeError) as said:
        trained(Between(Once.apply), None, method=optim.MartensHessianFree)
    assert (
        "the preconditioner takes the gradient of each example of Between"
        in said.value.__notes__[0]
    )
