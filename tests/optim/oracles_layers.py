"""Oracles of the methods that look at a layer's inputs and gradients: KFAC and its kin, MBF,
Eva, exact layer blocks. Section numbers are those of the specification they are written from.
"""

import torch

from tests.optim.oracles_base import (
    Oracle,
    assembled,
    example_gradients,
    inverse,
    kron,
    layer_units,
    layers_of,
)


def kronecker_factors(a, g):
    """A = (1/m) sum_n sum_t a aᵀ and G = (1/(m T)) sum_n sum_t g gᵀ."""
    m, T = a.shape[:2]
    A = sum(torch.outer(a[n, t], a[n, t]) for n in range(m) for t in range(T)) / m
    G = sum(torch.outer(g[n, t], g[n, t]) for n in range(m) for t in range(T)) / (m * T)
    return {"A": A, "G": G}


class KFAC(Oracle):
    """G ⊗ A (section 4)."""

    def statistics(self, seen, score):
        return {key: kronecker_factors(a, g) for key, (a, g, _) in seen.rows(score).items()}

    def dense_curvature(self, own):
        return kron(own["G"], own["A"])

    def dense_inverse(self, own):
        return kron(*(inverse(own[name], self.damping**0.5) for name in "GA"))


class EKFAC(Oracle):
    """(U_G ⊗ U_A) diag(S) (U_G ⊗ U_A)ᵀ (section 5): A, G; basis where due; S; all from zero.

    ra: EKFAC-ra, S of the mean gradient of m examples, squared, times m, by the data's labels.
    """

    def __init__(self, model, loss, *, ra=False, **settings):
        super().__init__(model, loss, **settings)
        self.from_mean, self.S_decay = ra, 0.75 if ra else self.decay

    def statistics(self, seen, score):
        return {key: kronecker_factors(a, g) for key, (a, g, _) in seen.rows(score).items()}

    def learn(self, seen, score):
        rows = seen.rows(score) if self.updating() else {}
        self.average({key: kronecker_factors(a, g) for key, (a, g, _) in rows.items()})
        if self.due():
            for own in self.state.values():
                self.new_basis(own)
        rows = seen.rows() if self.from_mean and rows else rows
        usual, self.decay = self.decay, self.S_decay
        self.average({key: self.scalings(key, a, g) for key, (a, g, _) in rows.items()})
        self.decay = usual
        for key, own in self.state.items():
            self.inverses[key] = self.dense_inverse(own)

    def new_basis(self, own):
        """Eigenvectors; S becomes the diagonal of the old diag(S) seen from the new basis."""
        U_A, U_G = torch.linalg.eigh(own["A"])[1], torch.linalg.eigh(own["G"])[1]
        if "S" in own:
            R_A, R_G = U_A.mT @ own["U_A"], U_G.mT @ own["U_G"]
            own["S"] = R_G.square() @ own["S"] @ R_A.square().mT
        own["U_A"], own["U_G"] = U_A, U_G

    def scalings(self, key, a, g):
        """E_n[(U_Gᵀ V_n U_A)²]."""
        U_A, U_G = self.state[key]["U_A"], self.state[key]["U_G"]
        V = example_gradients(a, g)
        if self.from_mean:
            return {"S": len(V) * (U_G.mT @ (sum(V) / len(V)) @ U_A).square()}
        return {"S": sum((U_G.mT @ V_n @ U_A).square() for V_n in V) / len(V)}

    def from_eigenvalues(self, own, values):
        U = kron(own["U_G"], own["U_A"])
        return U @ torch.diag(values.reshape(-1)) @ U.mT

    def dense_curvature(self, own):
        return self.from_eigenvalues(own, own["S"])

    def dense_inverse(self, own):
        return self.from_eigenvalues(own, 1 / (own["S"] + self.damping))


class TKFAC(Oracle):
    """delta Psi ⊗ Phi (section 6), Psi and Phi of trace one, delta the trace of the Fisher."""

    def statistics(self, seen, score):
        new = {}
        for key, (a, g, _) in seen.rows(score).items():
            V = example_gradients(a, g)
            new[key] = {
                "L": sum(V_n @ V_n.mT for V_n in V) / len(V),
                "R": sum(V_n.mT @ V_n for V_n in V) / len(V),
            }
        return new

    def dense_curvature(self, own):
        delta = own["L"].trace()
        return delta * kron(own["L"] / delta, own["R"] / delta)

    def dense_inverse(self, own):
        delta, o, i = own["L"].trace(), len(own["L"]), len(own["R"])
        left = own["L"] / delta * (delta * o / i).sqrt()
        right = own["R"] / delta * (delta * i / o).sqrt()
        root = self.damping**0.5
        return kron(inverse(left, root), inverse(right, root))


def block_sizes(layer, out, columns, fc_group):
    """How MBF cuts [out, columns] (bias last): per mini-block, its indices into row-major vec."""
    index = torch.arange(out * columns).reshape(out, columns)
    if isinstance(layer, torch.nn.Linear):
        return list(index) if fc_group == "output" else list(index.mT)
    size = layer.kernel_size[0] * layer.kernel_size[1]
    return [part for row in index for part in row.split(size)]  # the bias is a part of one


class MBF(Oracle):
    """Mini-blocks of the empirical Fisher, or of E[ĝ ĝᵀ] of mini-batch means (section 7).

    Linear: rows ("output") or columns ("input") of W_bar, one mean block for all (`fc_share`)
    or one each. Conv2d: kernel slices of every (o, i), and each bias alone, never shared.
    """

    heavy_ball = True
    decoupled = True

    def __init__(
        self,
        model,
        loss,
        *,
        estimator="minibatch",
        fc_group="output",
        fc_share=True,
        conv_share="none",
        **settings,
    ):
        super().__init__(model, loss, **settings)
        self.layers, self.conv_share = layers_of(self.model), conv_share
        self.estimator, self.fc_group, self.fc_share = estimator, fc_group, fc_share
        self.cuts = {}
        for key, M in self.M.items():
            self.cuts[key] = block_sizes(self.layers[key[0]], *M.shape, fc_group)

    def statistics(self, seen, score):  # noqa: ARG002
        new = {}
        for key, (a, g, _) in seen.rows().items():
            V = [V_n.reshape(-1) for V_n in example_gradients(a, g)]
            if self.estimator == "minibatch":
                V = [sum(V) / len(V)]
            blocks = []
            for cut in self.cuts[key]:
                blocks.append(sum(torch.outer(v[cut], v[cut]) for v in V) / len(V))
            if self.fc_share and isinstance(self.layers[key[0]], torch.nn.Linear):
                blocks = [sum(blocks) / len(blocks)] * len(blocks)
            if isinstance(self.layers[key[0]], torch.nn.Conv2d):
                blocks = self.shared(self.layers[key[0]], blocks)
            new[key] = dict(enumerate(blocks))
        return new

    def shared(self, layer, blocks):
        """Kernels' blocks replaced by the mean of those they share with; biases' by themselves."""
        row = layer.in_channels // layer.groups + (layer.bias is not None)
        biased = layer.bias is not None

        def kind(i):
            if biased and i % row == row - 1:
                return "bias", i
            return {"none": i, "output": i % row, "all": 0}[self.conv_share]

        kinds = [kind(i) for i in range(len(blocks))]
        own = {k: [b for b, other in zip(blocks, kinds, strict=True) if other == k] for k in kinds}
        return [sum(own[k]) / len(own[k]) for k in kinds]

    def scattered(self, key, blocks):
        """The mini-blocks at their places in [d, d]."""
        d = self.M[key].numel()
        dense = torch.zeros(d, d, dtype=self.M[key].dtype)
        for cut, block in zip(self.cuts[key], blocks, strict=True):
            dense[cut[:, None], cut] = block
        return dense

    def learn(self, seen, score):
        if self.updating():
            self.average(self.statistics(seen, score))
        if self.due():
            for key, own in self.state.items():
                inverses = [inverse(block, self.damping) for block in own.values()]
                self.inverses[key] = self.scattered(key, inverses)

    def due(self):
        return self.k % self.refresh_every == 0

    @property
    def curvature(self):
        return assembled({k: self.scattered(k, own.values()) for k, own in self.state.items()})


class Eva(Oracle):
    """γI + ḡ ḡᵀ ⊗ x̄ x̄ᵀ of means over examples and positions (section 11), g of the mean loss.

    The direction is scaled by nu = min(1, √(kl_clip / Σ lr² ⟨Δ, ∇⟩)) before the heavy ball;
    `P` is without it, `nu` that of the last step. A decay makes ∇ = ∇ + weight_decay W_bar.
    """

    heavy_ball = True

    def __init__(self, model, loss, *, decay=0.05, kl_clip=1e-3, **settings):
        super().__init__(model, loss, decay=decay, **settings)
        self.kl_clip = kl_clip

    def statistics(self, seen, score):  # noqa: ARG002
        new = {}
        for key, (a, g, _) in seen.rows().items():
            m, T = a.shape[:2]
            x_bar = sum(a[n, t] for n in range(m) for t in range(T)) / (m * T)
            g_bar = sum(g[n, t] / m for n in range(m) for t in range(T)) / (m * T)
            new[key] = {"x": x_bar, "g": g_bar}
        return new

    def due(self):
        return True

    def dense_curvature(self, own):
        v = kron(own["g"], own["x"])
        return torch.outer(v, v)

    def dense_inverse(self, own):
        return inverse(self.dense_curvature(own), self.damping)

    def move(self, seen):
        gradients = {k: g.reshape(-1) for k, g in self.decayed_gradient(seen).items()}
        directions = {key: self.inverses[key] @ g for key, g in gradients.items()}
        total = sum(self.lr**2 * (directions[key] @ g) for key, g in gradients.items())
        self.nu = min(1.0, (self.kl_clip / total).sqrt().item())
        for key, direction in directions.items():
            shape = self.M[key].shape
            self.M[key] = self.momentum * self.M[key] + self.nu * direction.reshape(shape)
            self.go(key, self.M[key])


class ExactFisher(Oracle):
    """F + damping I with F = (1/m) sum_n vec V_n (vec V_n)ᵀ (section 12), of the batch alone.

    across_groups: a grouped convolution's groups are one block, else one block each.
    """

    def __init__(self, model, loss, *, across_groups=True, **settings):
        if across_groups:
            self.units_of = layer_units
        super().__init__(model, loss, decay=0.0, **settings)

    def statistics(self, seen, score):
        groups = {key: example_gradients(a, g) for key, (a, g, _) in seen.rows(score).items()}
        new = {}
        for name, j in self.units:
            together = [V for (own, _), V in groups.items() if own == name]
            if len([key for key in self.units if key[0] == name]) > 1:
                together = [groups[name, j]]
            v = [torch.cat(parts).reshape(-1) for parts in zip(*together, strict=True)]
            new[name, j] = {"F": sum(torch.outer(v_n, v_n) for v_n in v) / len(v)}
        return new

    def due(self):
        return self.k % self.update_every == 0

    def dense_curvature(self, own):
        return own["F"]

    def dense_inverse(self, own):
        return inverse(own["F"], self.damping)
