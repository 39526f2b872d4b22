"""Every optimizer by name, small networks, and loops, shared by the optimizer tests."""

import inspect
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kronscope import optim

SIZES = (6, 5, 3, 5, 6)


class Recipe(NamedTuple):
    """An optimizer's class and the settings it is tested with."""

    method: str
    settings: dict


RECIPES = {
    "kbfgs": Recipe("KBFGS", {}),
    "kbfgs-l": Recipe("KBFGS", {"history": 3}),
    "kbfgs-limited": Recipe("KBFGSLimited", {"curvature_limit": 0.5}),  # is met often
    "kfac": Recipe("KFAC", {"lr": 0.3, "damping": 0.3, "refresh_every": 3}),
    "kfac-empirical": Recipe("KFAC", {"lr": 0.3, "damping": 0.3, "likelihood": "empirical"}),
    "kfac-2015": Recipe("KFAC2015", {"damping": 0.3, "weight_decay": 0.0, "refresh_every": 2}),
    "ekfac": Recipe("EKFAC", {"lr": 0.3, "damping": 0.3, "refresh_every": 3}),
    "ekfac-empirical": Recipe("EKFAC", {"lr": 0.3, "damping": 0.3, "likelihood": "empirical"}),
    "ekfac-ra": Recipe("EKFACra", {"lr": 0.3, "damping": 0.3, "refresh_every": 3}),
    "tkfac": Recipe("TKFAC", {"lr": 0.3, "damping": 0.3, "refresh_every": 3}),
    "tkfac-empirical": Recipe("TKFAC", {"lr": 0.3, "damping": 0.3, "likelihood": "empirical"}),
    "mbf": Recipe("MBF", {"lr": 0.03, "damping": 0.3, "refresh_every": 3}),
    "shampoo": Recipe("Shampoo", {"lr": 0.01, "damping": 0.01, "refresh_every": 3}),
    "tnt": Recipe("TNT", {"lr": 0.03, "damping": 0.5, "refresh_every": 3}),
    "tnt-empirical": Recipe("TNT", {"lr": 0.03, "damping": 0.5, "likelihood": "empirical"}),
    "eva": Recipe("Eva", {"lr": 0.05, "damping": 0.3}),
    "exact-fisher": Recipe("ExactFisher", {"lr": 0.3, "damping": 0.3}),
    "exact-fisher-empirical": Recipe(
        "ExactFisher", {"lr": 0.3, "damping": 0.3, "likelihood": "empirical"}
    ),
}
# of other optimizers, and of no layers: with suites of their own
APART = {"CurvatureOptimizer", "LayerwiseStep", "Damping", "HessianFree", "MartensHessianFree"}


def _maker(recipe):
    return lambda model, **kw: getattr(optim, recipe.method)(model, **{**recipe.settings, **kw})


MAKE = {kind: _maker(recipe) for kind, recipe in RECIPES.items() if recipe.method in optim.__all__}
# one of each method, and of those that use the gradients that backward delivers
DELIVERING = {"kfac-empirical", "ekfac-empirical"}
ONE_EACH = DELIVERING | {
    next(kind for kind in MAKE if RECIPES[kind].method == method)
    for method in {RECIPES[kind].method for kind in MAKE}
}
# two passes a step
CLOSURE = {k for k in MAKE if RECIPES[k].method in ("KBFGS", "KBFGSLimited", "KFAC2015")}
LEARNS_LATE = CLOSURE - {"kfac-2015"}  # after the step, so that P is what it was before
# whose steps are a share of -lr P M, and which find one step size for all groups
RESCALED, ONE_RATE = {"kbfgs-limited", "kfac-2015"}, {"kfac-2015"}
# made of .grad alone: no layer is watched
OF_GRADIENTS = {"mbf", "shampoo", "tnt-empirical"} & set(MAKE)
OF_PARAMETERS = {kind for kind in MAKE if RECIPES[kind].method in ("Shampoo", "TNT")}


# one for each kind of code: labels sampled, rows of examples delivered, two passes, .grad alone,
# single parameters, sums delivered, rows of the last batch, sampled gradients
QUICK = {"kfac", "ekfac-empirical", "kbfgs", "mbf", "shampoo", "eva", "exact-fisher", "tnt"}


def each(kinds):
    """Parameters of a test: all of these kinds, those not in `QUICK` marked slow."""
    return [
        pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow)
        for kind in sorted(kinds)
    ]


def takes(kind, *names):
    """Whether the method has these settings."""
    known = inspect.signature(getattr(optim, RECIPES[kind].method)).parameters
    return set(names) <= set(known)


def make_for(kind, case, **settings):
    """The optimizer for a case of models.py, with those of the settings it takes."""
    settings = {name: value for name, value in settings.items() if takes(kind, name)}
    if takes(kind, "likelihood") and "likelihood" not in RECIPES[kind].settings:
        settings["likelihood"] = case.likelihood
    return MAKE[kind](case.model, **settings)


def unclipped(kind):
    """Settings in which P is all of the step: Eva's clipping off."""
    return {"kl_clip": None} if takes(kind, "kl_clip") else {}


def is_sampled(kind):
    """Whether the recipe draws labels from the model."""
    return takes(kind, "likelihood") and RECIPES[kind].settings.get("likelihood") != "empirical"


def autoencoder(sizes=SIZES, activation=nn.Tanh):
    torch.manual_seed(1)
    layers = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def batches(count, m=16, size=6, seed=2):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(2, size, generator=generator)
    codes = torch.randn(count, m, 2, generator=generator)
    return list((codes @ basis).mul(2).sigmoid())


def loss_of(model, x):
    return F.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / len(x)


def closure_of(opt, model, x, loss=loss_of):
    def closure():
        opt.zero_grad()
        value = loss(model, x)
        value.backward()
        return value

    return closure


def train(opt, model, data, loss=loss_of):
    return [opt.step(closure_of(opt, model, x, loss)).item() for x in data]


def train_on(opt, case, data):
    """Train on batches of a case of models.py."""
    return train(opt, case.model, data, case.loss)


def blocks(model):
    """Name and module of every Linear."""
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear}


def w_bar(layer):
    """[W, b], detached."""
    parts = [layer.weight] + ([layer.bias[:, None]] if layer.bias is not None else [])
    return torch.cat([p.detach().clone() for p in parts], 1)


def gradient(layer):
    """Gradient of [W, b]."""
    return torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).clone()


def owned(model, name):
    """The parameters that P[name] acts on: a parameter, or a layer's weight and bias."""
    parameters = dict(model.named_parameters())
    if name in parameters:
        return [parameters[name]]
    layer = model.get_submodule(name)
    return [p for p in (layer.weight, layer.bias) if p is not None and p.requires_grad]


def vector(model, name, read):
    """read(parameter) of what P[name] acts on, in the order of the row-major vec of [W, b]."""
    values = [read(p).detach() for p in owned(model, name)]
    if len(values) == 1:
        return values[0].reshape(-1).clone()
    return torch.cat([values[0].flatten(1), values[1][:, None]], 1).reshape(-1)


def dense(opt):
    """{name: P}, dense copies of the preconditioner."""
    made = {}
    for name, P in opt.preconditioner().items():
        like = next(iter(opt.state.values()))["momentum"]
        made[name] = P @ torch.eye(P.shape[0], dtype=like.dtype, device=like.device)
    return made


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def state_of(opt):
    """Copies of all tensors in the state, parameter by parameter, key by key."""
    return [
        {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
        for state in opt.state.values()
    ]


def statistics(opt):
    """As state_of, without what every step moves: momentum and counters."""
    still = ("momentum", "counts")
    return [{k: v for k, v in state.items() if k not in still} for state in state_of(opt)]


def same(a, b):
    """Whether two results of state_of agree bit for bit."""
    return len(a) == len(b) and all(
        p.keys() == q.keys() and all(torch.equal(p[k], q[k]) for k in p)
        for p, q in zip(a, b, strict=True)
    )


def count(opt, parameter, name):
    """How often something happened to a parameter, over its groups."""
    return int(
        opt.state[parameter]["counts"]
        .reshape(-1, len(opt._harness.counts))
        .sum(0)[opt._harness.counts.index(name)]
    )
