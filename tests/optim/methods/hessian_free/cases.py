"""Shared by the tests of HessianFree: makers, counters, dense matrices, the path of a GPU."""

import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call

from kronscope import optim
from kronscope.optim.capture.likelihoods import FISHER
from kronscope.optim.methods.hessian_free.hessian_free import COUNTS
from tests.optim.cases import closure_of

SPLITS = {"plain": None, "blocks": []}  # all in one, every layer by itself
METHODS = {"plain": (optim.HessianFree, None), "blocks": (optim.HessianFree, [])} | {
    "martens": (optim.MartensHessianFree, None)
}
both = pytest.mark.parametrize("blocks", SPLITS.values(), ids=SPLITS)
every = pytest.mark.parametrize(("method", "blocks"), METHODS.values(), ids=METHODS)


def make(model, blocks=None, likelihood="bernoulli", *, method=optim.HessianFree, **settings):
    """HessianFree with five iterations on five examples, unless told otherwise."""
    known = {"lr": 0.5, "damping": 0.3, "max_cg": 5, "curvature_batch": 5} | settings
    return method(model, likelihood=likelihood, blocks=blocks, **known)


def make_for(case, blocks=None, **settings):
    return make(case.model, blocks, case.likelihood, **settings)


def step(opt, case, batch):
    """One step on a batch, the loss as a number."""
    return opt.step(closure_of(opt, case.model, batch, case.loss)).item()


def counts(opt):
    """{name: {block: how often}}, of what happened at all; iterations left out."""
    rows = {part.name: opt.state[part.parameters[0]]["counts"].tolist() for part in opt.parts}
    each = {n: {b: row[i] for b, row in rows.items() if row[i]} for i, n in enumerate(COUNTS)}
    return {n: found for n, found in each.items() if found and n != "iterations"}


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors]).clone()


def solutions(opt):
    """{block: the last d}, copies."""
    return {block: flat(own.values()) for block, own in opt.directions().items() if own}


def places(model, part):
    """Where the parameters of a part stand in the vector of all."""
    order = {p: i for i, p in enumerate(model.parameters())}
    pieces = torch.arange(sum(p.numel() for p in order)).split([p.numel() for p in order])
    return torch.cat([pieces[order[p]] for p in part.parameters])


def dense_ggn(case, x):
    """G [P, P] of all parameters in the model's order: J by reverse mode, H by its formula."""
    names = [name for name, _ in case.model.named_parameters()]
    values = tuple(p.detach() for p in case.model.parameters())

    def outputs(*at):
        return functional_call(case.model, dict(zip(names, at, strict=True)), (x,))

    z = outputs(*values)
    J = torch.autograd.functional.jacobian(outputs, values)
    J = torch.cat([j.reshape(z.numel(), -1) for j in J], 1)
    rows = torch.eye(z.numel())
    H = [FISHER[case.likelihood](z, e.reshape(z.shape)).reshape(-1) for e in rows]
    return J.T @ torch.stack(H) @ J / len(z)


def conjugate_gradients(A, b, x, limit, D=None, stop=None):
    """As in a textbook; the iterates and φ of each. stop(φ of all so far) -> whether to end."""
    D = torch.ones_like(b) if D is None else D

    def phi(v):
        return 0.5 * v @ A @ v - b @ v

    r = b - A @ x
    p, found, values = r / D, [x], [phi(x)]
    for _ in range(limit):
        alpha = (r @ (r / D)) / (p @ A @ p)
        x, old = x + alpha * p, r
        r = r - alpha * A @ p
        p = r / D + (r @ (r / D)) / (old @ (old / D)) * p
        found.append(x)
        values.append(phi(x))
        if stop is not None and stop(values):
            break
    return found, values


def mean_square_gradient(case, batch, rows):
    """Mean over these examples of the squared gradient of each."""
    total = 0
    for row in rows:
        loss = case.loss(case.model, tuple(part[row : row + 1] for part in batch))
        total = total + flat(torch.autograd.grad(loss, list(case.model.parameters()))).square()
    return total / len(rows)


class Later:
    """The event of a copy to the host that takes one step more."""

    def __init__(self):
        self.asked = 0

    def query(self):
        self.asked += 1
        return self.asked > 1


def as_on_a_gpu(monkeypatch, event=Later):
    """Nothing can be read for nothing, and flags arrive later; how many modules were told."""
    new = {"free_to_read": lambda _: False, "to_host": lambda flags: (flags.clone(), event())}
    found = [
        (module, name)
        for key, module in sys.modules.items()
        for name in new
        if key.startswith("kronscope.optim") and name in vars(module)
    ]
    for module, name in found:
        monkeypatch.setattr(module, name, new[name])
    return len(found)


class Slope(torch.autograd.Function):
    """g (1 - y²), whose own derivative by g is `Bend.factor` times the true one."""

    @staticmethod
    def forward(ctx, g, y):
        ctx.save_for_backward(y)
        return g * (1 - y * y)

    @staticmethod
    def backward(ctx, v):
        (y,) = ctx.saved_tensors
        return v * (1 - y * y) * Bend.factor, None


class Bend(torch.autograd.Function):
    """The tangens hyperbolicus, whose second derivative may be spoilt."""

    factor = 1.0

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return Slope.apply(g, *ctx.saved_tensors)


class Between(nn.Module):
    """Two layers and a function between them."""

    def __init__(self, function=Bend.apply):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last, self.function = nn.Linear(6, 4), nn.Linear(4, 6), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))
