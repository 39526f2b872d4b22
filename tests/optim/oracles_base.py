"""What the oracles share: rows of every layer by hooks, dense blocks, the loop of a step.

Slow, dense and float64 on purpose. A unit is what gets one dense preconditioner: the W_bar of
a layer, or of one group of a convolution, or one parameter. Keys of units are (name, index).
"""

import copy
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F


def layers_of(model):
    """{name: module} of every Linear and Conv2d."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def copy_without_hooks(model):
    """A deep copy that leaves an optimizer's hooks behind, and the model as it is."""
    memo = {}
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            memo[id(hooks)] = OrderedDict()  # deepcopy takes this for the copy already made
    return copy.deepcopy(model, memo)


class Unit:
    """Rows of one or two parameters, side by side as a matrix: [W, b], or one parameter."""

    def __init__(self, parameters, rows):
        self.parameters, self.rows = [p for p in parameters if p is not None], rows
        self.count = len(range(*rows.indices(len(self.parameters[0]))))

    def matrix(self, of=lambda p: p):
        """[rows, columns] of the parameters, or of what `of` knows of them."""
        parts = [of(p).detach()[self.rows].reshape(self.count, -1) for p in self.parameters]
        return torch.cat(parts, 1)

    def set_(self, matrix):
        start = 0
        for p in self.parameters:
            size = p[0].numel()
            part = matrix[:, start : start + size]
            p.data[self.rows] = part.reshape(p[self.rows].shape)
            start += size


def group_units(model):
    """One unit per layer, and per group of a grouped convolution."""
    units = {}
    for name, layer in layers_of(model).items():
        groups = getattr(layer, "groups", 1)
        size = layer.weight.shape[0] // groups
        for j in range(groups):
            rows = slice(j * size, (j + 1) * size)
            units[name, j] = Unit([layer.weight, layer.bias], rows)
    return units


def layer_units(model):
    """One unit per layer, groups or not."""
    layers = layers_of(model).items()
    return {(n, 0): Unit([layer.weight, layer.bias], slice(None)) for n, layer in layers}


def parameter_units(model):
    return {(name, 0): Unit([p], slice(None)) for name, p in model.named_parameters()}


def padded(conv, x):
    """x with the border that the convolution adds; "same" puts the odd row right and below."""
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        (top, bottom), (left, right) = [(n // 2, n - n // 2) for n in total]
    else:
        (top, left) = (bottom, right) = (0, 0) if conv.padding == "valid" else conv.padding
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, (left, right, top, bottom), mode=mode)


def patches(conv, x, group):
    """What each output position of one group sees, [m, T, I/groups * kh * kw]."""
    x = padded(conv, x)
    inputs = conv.in_channels // conv.groups
    x = x[:, group * inputs : (group + 1) * inputs]
    reach = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    seen = []
    for i in range(0, x.shape[2] - reach[0] + 1, conv.stride[0]):
        for j in range(0, x.shape[3] - reach[1] + 1, conv.stride[1]):
            window = x[:, :, i : i + reach[0], j : j + reach[1]]
            window = window[:, :, :: conv.dilation[0], :: conv.dilation[1]]
            seen.append(window.reshape(len(x), -1))
    return torch.stack(seen, 1)


def inputs_of(layer, x, group):
    """a [m, T, in+1], the 1 last and only if there is a bias."""
    if isinstance(layer, nn.Conv2d):
        a = patches(layer, x, group)
    else:
        a = x.reshape(len(x), -1, x.shape[-1])
    return a if layer.bias is None else torch.cat([a, torch.ones_like(a[..., :1])], -1)


def outputs_of(layer, z, group):
    """Rows [m, T, out/groups] of a layer's output or of a gradient of its shape."""
    if isinstance(layer, nn.Conv2d):
        return z.flatten(2).mT.chunk(layer.groups, -1)[group]
    return z.reshape(len(z), -1, z.shape[-1])


class Seen:
    """One forward pass: value of the loss, output, and the calls (x, z) of every layer."""

    def __init__(self, model, loss, batch):
        self.layers, self.calls, handles = layers_of(model), {}, []
        for name, layer in self.layers.items():

            def keep(_, args, z, name=name):
                self.calls.setdefault(name, []).append((args[0].detach(), z))

            handles.append(layer.register_forward_hook(keep))

        def keep_output(_, __, output):
            self.output = output

        handles.append(model.register_forward_hook(keep_output))
        self.value = loss(model, batch)
        for handle in handles:
            handle.remove()
        self.parameters = list(model.parameters())
        self.m = len(self.output)

    def gradient(self, score=None):
        """p -> gradient of the mean loss of the data's labels, or of those behind `score`."""
        head = self.value if score is None else self.output
        weight = None if score is None else score(self.output.detach()) / self.m
        grads = torch.autograd.grad(head, self.parameters, weight, retain_graph=True)
        table = {id(p): g for p, g in zip(self.parameters, grads, strict=True)}
        return lambda p: table[id(p)]

    def rows(self, score=None):
        """{(layer, group): (a [m, T, in+1], g [m, T, out], z like g)}; calls are more positions.

        g is the gradient of per-example losses: of the data's labels, or those behind `score`.
        """
        zs = [z for calls in self.calls.values() for _, z in calls]
        if score is None:
            grads = [g * self.m for g in torch.autograd.grad(self.value, zs, retain_graph=True)]
        else:
            weight = score(self.output.detach())
            grads = list(torch.autograd.grad(self.output, zs, weight, retain_graph=True))
        rows = {}
        for name, calls in self.calls.items():
            layer, own = self.layers[name], [grads.pop(0) for _ in calls]
            for j in range(getattr(layer, "groups", 1)):
                a = torch.cat([inputs_of(layer, x, j) for x, _ in calls], 1)
                g = torch.cat([outputs_of(layer, g, j) for g in own], 1)
                z = torch.cat([outputs_of(layer, z.detach(), j) for _, z in calls], 1)
                rows[name, j] = a, g, z
        return rows


def example_gradients(a, g):
    """V_n = sum_t g_nt a_ntᵀ, a list of [out, in+1]."""
    return [g_n.mT @ a_n for a_n, g_n in zip(a, g, strict=True)]


def inverse(matrix, damping=0.0):
    return torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype))


def kron(left, right):
    """left ⊗ right; torch.kron refuses some strides that inv and eigh return."""
    return torch.kron(left.contiguous(), right.contiguous())


def assembled(parts):
    """{name: block_diag of the parts (name, 0), (name, 1), ...}."""
    names = dict.fromkeys(name for name, _ in parts)
    return {n: torch.block_diag(*[B for (own, _), B in parts.items() if own == n]) for n in names}


class Oracle:
    """A step: learn statistics, make the dense P where due, W_bar <- W_bar - lr P M.

    A method says how in `statistics`, `dense_curvature`, `dense_inverse` and `due`. The model
    is copied. After a step `P` and `curvature` are {name: [d, d]}, and `state[name, group]` holds
    the running averages.
    """

    heavy_ball = False  # else M <- momentum M + (1 - momentum) ∇
    decoupled = False  # weight decay
    rests_when_warm = False  # statistics stay as they are at step 0 after a warm-up
    units_of = staticmethod(group_units)

    def __init__(
        self,
        model,
        loss,
        *,
        lr,
        damping,
        momentum=0.9,
        decay=0.9,
        weight_decay=0.0,
        decoupled=None,
        update_every=1,
        refresh_every=20,
    ):
        self.model, self.loss = copy_without_hooks(model), loss
        self.lr, self.damping = lr, damping
        self.momentum, self.decay, self.weight_decay = momentum, decay, weight_decay
        self.decoupled = type(self).decoupled if decoupled is None else decoupled
        self.update_every, self.refresh_every = update_every, refresh_every
        self.k, self.warm = 0, False
        self.units = self.units_of(self.model)
        self.state = {key: {} for key in self.units}
        self.M = {key: torch.zeros_like(unit.matrix()) for key, unit in self.units.items()}
        self.inverses = {}

    def step(self, batch, score=None):
        """One step on a batch; returns the loss before it.

        score: output -> gradient of each example's -log p(label | output), for methods that
        sample labels; called once and on update steps only. None: the data's own labels.
        """
        seen = Seen(self.model, self.loss, batch)
        self.learn(seen, score)
        self.move(seen)
        self.k += 1
        return seen.value.item()

    def warm_up(self, batches, score=None):
        """Start the running averages from plain means over batches."""
        for j, batch in enumerate(batches, start=1):
            new = self.statistics(Seen(self.model, self.loss, batch), score)
            for key, own in new.items():
                for name, value in own.items():
                    old = self.state[key].get(name, 0.0)
                    self.state[key][name] = old + (value - old) / j
        self.warm = True

    def updating(self):
        resting = self.k == 0 and self.warm and self.rests_when_warm
        return self.k % self.update_every == 0 and not resting

    def learn(self, seen, score):
        if self.updating():
            self.average(self.statistics(seen, score))
        if self.due():
            for key, own in self.state.items():
                self.inverses[key] = self.dense_inverse(own)

    def average(self, new):
        """Own <- decay own + (1 - decay) new, from zero."""
        for key, own in new.items():
            for name, value in own.items():
                old = self.state[key].get(name, 0.0)
                self.state[key][name] = self.decay * old + (1 - self.decay) * value

    def due(self):
        return self.k <= self.refresh_every or self.k % self.refresh_every == 0

    def decayed_gradient(self, seen):
        """{key: ∇ + weight_decay W_bar}, or ∇ where the decay is decoupled."""
        of, tau = seen.gradient(), 0.0 if self.decoupled else self.weight_decay
        return {key: unit.matrix(of) + tau * unit.matrix() for key, unit in self.units.items()}

    def move(self, seen):
        for key, gradient in self.decayed_gradient(seen).items():
            new = gradient if self.heavy_ball else (1 - self.momentum) * gradient
            self.M[key] = self.momentum * self.M[key] + new
            self.go(key, self.inverses[key] @ self.M[key].reshape(-1))

    def go(self, key, direction):
        """W_bar <- (1 - lr weight_decay if decoupled) W_bar - lr direction."""
        unit = self.units[key]
        W = unit.matrix()
        shrink = 1 - self.lr * self.weight_decay if self.decoupled else 1.0
        unit.set_(shrink * W - self.lr * direction.reshape(W.shape))

    @property
    def P(self):
        """{name: dense preconditioner [d, d] of the last step}."""
        return assembled(self.inverses)

    @property
    def curvature(self):
        """{name: dense undamped curvature [d, d] of the running averages held now}."""
        return assembled({key: self.dense_curvature(own) for key, own in self.state.items()})
