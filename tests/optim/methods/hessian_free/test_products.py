"""HessianFree against dense matrices and conjugate gradients written out, in float64."""

import pytest
import torch
from torch import nn

from kronscope import optim
from kronscope.optim.methods.hessian_free.gauss_newton import GaussNewton
from kronscope.optim.methods.hessian_free.jacobians import (
    DoubleBackward,
    ForwardMode,
    Linearised,
    Piece,
)
from tests.optim.cases import closure_of
from tests.optim.methods.hessian_free.cases import (
    conjugate_gradients,
    dense_ggn,
    flat,
    places,
)
from tests.optim.models import CASES, categorical_loss

SPLITS = {
    "mlp": [None, [["0", "2"]]],
    "cnn": [None, []],
    "shared": [[["spread", "mix"], ["cell", "last"]], []],
    "recurrent": [None, [["cell"]]],
}


class Recurrent(nn.Module):
    """A plain recurrent network in tensor operations."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(3 + 4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            h = torch.tanh(self.cell(torch.cat([step, h], 1)))
        return self.head(h)


def case_of(name):
    if name != "recurrent":
        return CASES[name]()
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(5, 8, 4, 3, generator=generator, dtype=torch.float64)
    t = torch.randint(3, (5, 8), generator=generator)
    torch.manual_seed(3)
    kind = type(CASES["mlp"]())
    return kind(Recurrent().double(), list(zip(x, t, strict=True)), categorical_loss, "categorical")


def each_split(names=tuple(SPLITS)):
    return pytest.mark.parametrize(
        ("name", "blocks"),
        [(name, split) for name in names for split in SPLITS[name]],
        ids=lambda value: value if isinstance(value, str) else str(value),
    )


@pytest.mark.parametrize(
    ("route", "name", "blocks"),
    [
        *(
            (route, name, SPLITS[name][1])
            for route in (DoubleBackward, ForwardMode)
            for name in SPLITS
        ),
        (Linearised, "cnn", None),
        (Linearised, "shared", []),
    ],
)
def test_products_are_those_of_the_dense_matrix(route, name, blocks):
    # PyTorch's tracing loses what circular padding writes in place (choose_route would notice)
    plain = name == "cnn" and route is Linearised
    case = CASES["cnn"](kernel=3, padding_mode="zeros") if plain else case_of(name)
    x = case.batches[0][0]
    G = dense_ggn(case, x)
    opt = optim.HessianFree(case.model, blocks=blocks, likelihood=case.likelihood)
    parts = [part.parameters for part in opt.parts]
    halves = [Piece(case.model, 3, (x[:3],)), Piece(case.model, len(x) - 3, (x[3:],))]
    products = GaussNewton(halves, parts, case.likelihood, route)
    generator = torch.Generator().manual_seed(1)
    for number, part in enumerate(opt.parts):
        v = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in part.parameters]
        (found,) = products.products([number], [v])
        own = places(case.model, part)
        # some hundred terms of order one in float64
        torch.testing.assert_close(flat(found), G[own][:, own] @ flat(v), rtol=1e-10, atol=1e-12)


@each_split()
def test_converged_it_is_the_damped_solution_of_each_block(name, blocks):
    case = case_of(name)
    batch = case.batches[0]
    opt = optim.HessianFree(
        case.model, 0.7, 0.3, blocks=blocks, likelihood=case.likelihood, max_cg=400,
        curvature_batch=len(batch[0]),
    )  # fmt: skip
    G, before = dense_ggn(case, batch[0]), flat(case.model.parameters())
    opt.step(closure_of(opt, case.model, batch, case.loss))
    g = flat([p.grad for p in case.model.parameters()])
    moved = (flat(case.model.parameters()) - before) / 0.7
    for part in opt.parts:
        own = places(case.model, part)
        block = G[own][:, own] + 0.3 * torch.eye(len(own))
        # conjugate gradients end at a residual of 1e-16, the condition is below 100
        torch.testing.assert_close(
            moved[own], -torch.linalg.solve(block, g[own]), rtol=0, atol=1e-8
        )


@each_split(("mlp", "shared"))
def test_few_iterations_from_the_last_solution(name, blocks):
    """Five steps of seven iterations, on a curvature batch that is part of the batch."""
    case = case_of(name)
    model, tau = case.model, 0.01
    opt = optim.HessianFree(model, 0.5, 0.2, 0.6, tau, case.likelihood, 5, 7, blocks=blocks)
    last = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for batch in case.batches[:5]:
        theta = flat(model.parameters())
        twin = optim.HessianFree(model, blocks=blocks)  # only its rows are drawn ahead
        twin._generator.set_state(opt._generator.get_state())
        rows = torch.randperm(len(batch[0]), generator=twin._generator)[:5].sort().values
        G = dense_ggn(case, batch[0][rows])
        opt.step(closure_of(opt, model, batch, case.loss))
        assert torch.equal(opt.rows, rows)
        g = flat([p.grad for p in model.parameters()]) + tau * theta
        for part in opt.parts:
            own = places(model, part)
            A = G[own][:, own] + (0.2 + tau) * torch.eye(len(own))
            found, _ = conjugate_gradients(A, -g[own], 0.6 * last[own], 7)
            last[own] = found[-1]
        torch.testing.assert_close(flat(model.parameters()), theta + 0.5 * last, rtol=0, atol=1e-9)


def whole(name):
    """All layers of a case, by name."""
    return [[child for child, _ in CASES[name]().model.named_children()]]


@pytest.mark.parametrize("name", ["mlp", "shared"])
def test_one_block_is_plain_hessian_free_bit_for_bit(name):
    ends = []
    for blocks in (None, whole(name), lambda _: whole(name)):
        torch.manual_seed(5)
        case = CASES[name]()
        opt = optim.HessianFree(
            case.model, 0.5, 0.1, likelihood=case.likelihood, curvature_batch=5, blocks=blocks
        )
        for batch in case.batches[:4]:
            opt.step(closure_of(opt, case.model, batch, case.loss))
        ends.append(flat(case.model.parameters()))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


@pytest.mark.parametrize(("name", "blocks"), [("mlp", None), ("cnn", []), ("shared", [])])
def test_training_lowers_the_loss(name, blocks):
    case = CASES[name](count=1, m=16)
    opt = optim.HessianFree(
        case.model, 1.0, 1.0, likelihood=case.likelihood, blocks=blocks, curvature_batch=8
    )
    losses = [
        opt.step(closure_of(opt, case.model, case.batches[0], case.loss)).item() for _ in range(15)
    ]
    assert losses[-1] < 0.98 * losses[0]
