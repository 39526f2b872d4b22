"""Reading live optimizers: by structure, copied, and honest."""

import pytest
import torch

from kronscope import optim
from kronscope.diag import Diagonal, Kronecker, approximations, dense, live
from kronscope.diag.operators import BlockDiagonal, Dense


class Maps:
    """An optimizer nobody has heard of: known by its parts alone."""

    def __init__(self, **maps):
        self.maps = maps

    def preconditioner(self):
        return self.maps


class Parts:
    def __init__(self, **parts):
        self.__dict__.update(parts)


class Applied:
    """A map with `.shape` and `@` only."""

    def __init__(self, matrix):
        self.matrix, self.shape, self.dtype = matrix, matrix.shape, matrix.dtype

    def __matmul__(self, v):
        return self.matrix @ v


def spd(k):
    root = torch.randn(k, k)
    return root @ root.T + torch.eye(k)


class Nested:
    """A map that tells its precision only through what it is made of."""

    def __init__(self, matrix):
        self.parts, self.shape = [Parts(name="inner", matrix=matrix)], matrix.shape

    def __matmul__(self, v):
        return self.parts[0].matrix @ v


def test_a_map_of_another_precision_than_the_default():
    M = spd(4).float()
    found = live.preconditioners(Maps(nested=Nested(M)))["nested"]
    torch.testing.assert_close(dense(found), M.double())


@pytest.mark.parametrize("name", ["EKFAC", "MBF", "Shampoo", "Eva", "ExactFisher"])
def test_every_kind_of_map_of_a_float32_network(name):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 2), torch.nn.Flatten(), torch.nn.Linear(8, 2)
    ).float()
    own = {"likelihood": "empirical"} if name in ("EKFAC", "ExactFisher") else {}
    opt = getattr(optim, name)(model, **own)
    x = torch.randn(6, 1, 3, 3, dtype=torch.float32)
    opt.zero_grad()
    model(x).square().sum(1).mean().backward()
    opt.step()
    maps = opt.preconditioner()
    for key, found in live.preconditioners(opt).items():
        eye = torch.eye(maps[key].shape[0], dtype=torch.float32)
        torch.testing.assert_close(dense(found).float(), maps[key] @ eye)


def test_maps_are_known_by_their_parts():
    G, A, M = spd(2), spd(3), spd(6)
    blocks = torch.stack([spd(3), spd(3)])
    found = live.preconditioners(
        Maps(
            kron=Parts(left=G, right=A),
            lazy=Parts(left=Applied(G), right=A),
            blocks=Parts(blocks=blocks),
            listed=Parts(blocks=[G, spd(4)]),
            diagonal=Parts(diagonal=torch.ones(6)),
            matrix=M,
            applied=Applied(M),
        )
    )
    assert isinstance(found["kron"], Kronecker)
    torch.testing.assert_close(dense(found["kron"]), torch.kron(G, A))
    torch.testing.assert_close(dense(found["lazy"]), torch.kron(G, A))
    assert isinstance(found["blocks"], BlockDiagonal)
    torch.testing.assert_close(dense(found["blocks"]), torch.block_diag(*blocks))
    assert found["listed"].shape == (6, 6)
    assert isinstance(found["diagonal"], Diagonal)
    assert isinstance(found["matrix"], Dense)
    torch.testing.assert_close(dense(found["applied"]), M)


@pytest.mark.parametrize("listed", [False, True])
def test_the_order_of_the_coordinates_is_read(classifier, listed):
    own = approximations.mini_block_input(classifier, classifier.block("2"))
    parts = Parts(blocks=list(own.blocks) if listed else own.blocks, order=own.order)
    found = live.read(parts)
    assert isinstance(found, BlockDiagonal)
    torch.testing.assert_close(dense(found), dense(own))
    parts.order.zero_()  # what is read is a copy
    assert len(found.order.unique()) == len(found.order)


def test_a_sum_of_kronecker_products(classifier):
    own = approximations.best_kronecker(classifier, classifier.block("2"), rank=2)
    assert own.left.ndim == 3
    found = live.read(own)
    assert found.shape == own.shape
    torch.testing.assert_close(dense(found), dense(own))


def test_curvatures_are_inverses():
    G, A = spd(2), spd(3)
    found = live.curvatures(Maps(layer=Parts(left=G, right=A)))["layer"]
    torch.testing.assert_close(dense(found), torch.linalg.inv(torch.kron(G, A)))


def test_an_undamped_curvature_is_read_where_there_is_one():
    assert live.undamped(Maps(layer=Parts(left=spd(2), right=spd(3)))) == {}
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    optimizer = optim.KFAC(model, likelihood="gaussian")
    (0.5 * model(torch.randn(20, 4)).square().sum(1).mean()).backward()
    optimizer.step()
    found = live.undamped(optimizer)
    assert set(found) == {"0", "2"}
    state = optimizer.state[model[0].weight]
    torch.testing.assert_close(dense(found["0"]), torch.kron(state["G"], state["A"]))


def test_what_is_read_is_a_copy():
    G, A = spd(2), spd(3)
    found = live.preconditioners(Maps(layer=Parts(left=G, right=A)))["layer"]
    before = dense(found).clone()
    G.zero_()
    torch.testing.assert_close(dense(found), before)


def test_something_else_is_refused():
    with pytest.raises(TypeError, match=r"cannot read a str.*\.shape and @"):
        live.preconditioners(Maps(layer="nothing"))


@pytest.mark.parametrize("history", [None, 5])
def test_a_step_is_minus_lr_p_g_with_the_p_that_diag_reads(history):
    """The two packages never meet but here: what diag reads is what optim does."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    x, t = torch.randn(20, 4), torch.randn(20, 2)
    optimizer = optim.KBFGS(model, lr=0.1, momentum=0.0, history=history)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - t).square().sum(1).mean()
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    P = live.preconditioners(optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with optimizer.frozen():
        optimizer.step(closure)
    for name in ("0", "2"):
        W, b = model.get_submodule(name).weight, model.get_submodule(name).bias
        gradient = torch.cat([W.grad, b.grad[:, None]], 1).reshape(-1)
        moved = torch.cat([W - before[f"{name}.weight"], (b - before[f"{name}.bias"])[:, None]], 1)
        torch.testing.assert_close(moved.detach().reshape(-1), -0.1 * (P[name] @ gradient))
