"""Dense curvature blocks from their definitions, slow and obvious, to hold BackPACK against."""

from functools import wraps
from itertools import pairwise

import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.distributions import Bernoulli, Categorical, Normal
from torch.func import functional_call
from torch.nn.functional import one_hot

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def kept(method):
    """A method of one block, computed once for each."""

    @wraps(method)
    def once(self, block):
        key = (method.__name__, block.name)
        if key not in self.known:
            self.known[key] = method(self, block)
        return self.known[key]

    return once


class Definitions:
    """What each extension should compute for a block of the problem, [d, d]; `labels` [k, n, c] are
    the scores of sampled labels, drawn as BackPACK draws them after the seed."""

    def __init__(self, problem, samples, seed):
        self.known = {}
        self.problem, self.model, self.n = problem, problem.model, problem.n
        with torch.no_grad():
            z = self.model(problem.inputs)
        summed = problem.total_loss
        whole = hessian(lambda v: summed(v.reshape(z.shape)), z.flatten())
        tiles = whole.reshape(self.n, -1, self.n, z[0].numel())
        self.H = torch.stack([tiles[n, :, n, :] for n in range(self.n)])  # [n, c, c]
        self.slope = jacobian(summed, z).flatten(1)  # [n, c]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.labels = scores(problem.loss, z, samples)

    def __call__(self, extension, block):
        made = getattr(self, extension.lower().removesuffix("exact"))(block)
        return torch.diag(made.diagonal()) if extension.startswith("Diag") else made

    @kept
    def J(self, block):
        """Jacobian of each example's outputs, [n, c, d]."""
        parts = {}
        for name in block.parameters:
            value = self.model.get_parameter(name).detach()
            found = jacobian(
                lambda w, name=name: functional_call(
                    self.model, {name: w}, (self.problem.inputs,), tie_weights=True
                ),
                value,
            )
            parts[name] = found.reshape(self.n, -1, *value.shape)
        return block.join(parts)

    @kept
    def sqrtggn(self, block):
        J = self.J(block)
        return torch.einsum("nad,nab,nbe->de", J, self.H, J) / self.n

    @kept
    def sqrtggnmc(self, block):
        roots = torch.einsum("ncd,knc->knd", self.J(block), self.labels).flatten(0, 1)
        return roots.T @ roots / self.n

    def batchgrad(self, block):
        g = torch.einsum("ncd,nc->nd", self.J(block), self.slope)
        return g.T @ g / self.n

    diagggn, diagggnmc = sqrtggn, sqrtggnmc

    @kept
    def diaghessian(self, block):
        def value(v):
            return self.problem.loss(self.problem.outputs(block, v), self.problem.targets)

        return hessian(value, torch.zeros(block.d))

    def kflr(self, block):
        return self.kronecker(block, self.sqrtggn)

    def kfac(self, block):
        return self.kronecker(block, self.sqrtggnmc)

    def kronecker(self, block, of):
        """G/T ⊗ A: G of a shift of the layer's outputs shared by its T positions, its bias."""
        name = block.members[0].module
        A, T = self.inputs(block)
        return kron(of(self.problem.block(f"{name}.bias")) / T, A)

    def kfra(self, block):
        """G ← mean_n J_nᵀ G J_n through each module from the outputs down to the layer's."""
        layer = self.model.get_submodule(block.members[0].module)
        seen = [self.problem.inputs]
        modules = list(flat(self.model))
        for module in modules:
            seen.append(module(seen[-1]).detach())
        G = self.H.mean(0)
        for module, (x, z) in reversed(list(zip(modules, pairwise(seen), strict=True))):
            if module is layer:
                break
            J = [jacobian(lambda v, m=module: m(v[None])[0], example) for example in x]
            J = torch.stack(J).reshape(self.n, z[0].numel(), x[0].numel())
            G = torch.einsum("nai,ab,nbj->ij", J, G, J) / self.n
        A, T = self.inputs(block)
        G = G.reshape(len(G) // T, T, len(G) // T, T).sum((1, 3))
        return kron(G / T, A)

    @kept
    def inputs(self, block):
        """A = mean_n Σ_t a_t a_tᵀ and T; a_t is the slope of output 0 at t in its own weights."""
        name = block.members[0].module
        layer, seen = self.model.get_submodule(name), []
        handle = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
        self.model(self.problem.inputs)
        handle.remove()
        a = []
        for parameter in block.parameters:
            own = parameter.rpartition(".")[2]
            value = getattr(layer, own).detach()
            slopes = jacobian(
                lambda w, own=own: functional_call(layer, {own: w}, (seen[0],))[:, 0], value
            )
            slopes = slopes.reshape(self.n, -1, *value.shape)[:, :, 0]  # in the weights of output 0
            a.append(slopes.reshape(*slopes.shape[:2], -1))
        a = torch.cat(a, 2)  # [n, T, in+1]
        return torch.einsum("nti,ntj->ij", a, a) / self.n, a.shape[1]


def kron(left, right):
    return torch.kron(left.contiguous(), right.contiguous())  # it fails on some strides


def flat(model):
    """The steps of a chain, in calling order."""
    if isinstance(model, nn.Sequential) or hasattr(model, "steps"):
        for child in getattr(model, "steps", model):
            yield from flat(child)
    else:
        yield model


def scores(loss, z, samples):
    """Gradients [k, n, c] of the per-example losses for sampled labels, over √k; their second
    moment per example tends to the output Hessian. None for a loss without likelihood."""
    if isinstance(loss, nn.CrossEntropyLoss):
        p = z.softmax(1)
        drawn = Categorical(p.movedim(1, -1)).sample((samples,))
        found = p - one_hot(drawn, z.shape[1]).movedim(-1, 2)
        terms = z[0, 0].numel()
    elif isinstance(loss, nn.MSELoss):
        found, terms = 2 * (Normal(z, 0.5**0.5).sample((samples,)) - z), z[0].numel()
    elif isinstance(loss, nn.BCEWithLogitsLoss):
        p = z.sigmoid()
        found, terms = p - Bernoulli(p).sample((samples,)), z[0].numel()
    else:
        return None
    return found.flatten(2) / (samples * terms) ** 0.5
