"""Oracle of K-BFGS and K-BFGS(L), for Linear and Conv2d (sections 2 and 3)."""

import torch
from torch import nn

from tests.optim.oracles_base import Oracle, Seen, assembled, inverse, kron

MU_1 = 0.2


def mean_over_positions(rows):
    """[m, T, size] -> [size]."""
    m, T = rows.shape[:2]
    return sum(rows[n, t] for n in range(m) for t in range(T)) / (m * T)


def input_factor(a):
    """A = (1/m) sum_n sum_t a aᵀ."""
    m, T = a.shape[:2]
    return sum(torch.outer(a[n, t], a[n, t]) for n in range(m) for t in range(T)) / m


def powell(s, y, H):
    """Step 8a: s with s·y >= 0.2 yᵀHy."""
    sy, yHy = s @ y, y @ H @ y
    if sy > MU_1 * yHy:
        return s, False
    theta = (1 - MU_1) * yHy / (yHy - sy)
    return theta * s + (1 - theta) * (H @ y), True


def second_damping(s, y, mu_2):
    """Step 8b: y with s·y >= mu_2 s·s. Its guard for mu_2 >= 1 is left open, so refused here."""
    sy, ss = s @ y, s @ s
    if sy > mu_2 * ss:
        return y, False
    if mu_2 >= 1:
        raise ValueError(f"the oracle knows no guard for damping >= 1, got mu_2 = {mu_2}")
    theta = (1 - mu_2) * ss / (ss - sy)
    return theta * y + (1 - theta) * s, True


def acceptable(s, y, gradient):
    """Skip where s·y <= 0 or s·y <= 1e-4 ‖s‖² ‖gradient‖."""
    return bool(s @ y > 0 and s @ y > 1e-4 * (s @ s) * gradient.norm())


def inverse_bfgs(H, s, y):
    """(I - ρ s yᵀ) H (I - ρ y sᵀ) + ρ s sᵀ: step 9 multiplied out."""
    rho = 1 / (s @ y)
    left = torch.eye(len(s), dtype=s.dtype) - rho * torch.outer(s, y)
    return left @ H @ left.mT + rho * torch.outer(s, s)


class KBFGS(Oracle):
    """H_g ⊗ H_a; `P` is what the last step used, `next_P` what the next one will.

    state[name, group]: A (running for Linear; what H_a began from for Conv2d), H_a, H_g, the
    averages s and y, the accepted damped pairs, and how often Powell and the second damping
    fired, how many H_g and H_a were accepted. The second point is where the parameters end,
    decoupled decay included.
    """

    rests_when_warm = True
    curvature = None

    def __init__(self, model, loss, *, history=None, pair_decay=None, **settings):
        super().__init__(model, loss, **settings)
        self.history = history
        self.pair_decay = self.decay if pair_decay is None else pair_decay

    def convolution(self, key):
        return isinstance(self.model.get_submodule(key[0]), nn.Conv2d)

    def statistics(self, seen, score):  # noqa: ARG002
        return {key: {"A": input_factor(a)} for key, (a, _, _) in seen.rows().items()}

    def step(self, batch, score=None):  # noqa: ARG002
        seen = Seen(self.model, self.loss, batch)
        rows = seen.rows() if self.k % self.update_every == 0 else {}
        if self.updating():
            for key, (a, _, _) in rows.items():
                if not (self.convolution(key) and "H_a" in self.state[key]):
                    self.average({key: {"A": input_factor(a)}})
        for key, (_, g, _) in rows.items():
            if "H_a" not in self.state[key]:
                self.start(self.state[key], self.damping**0.5, g.shape[2])
        self.inverses = {k: kron(o["H_g"], o["H_a"]) for k, o in self.state.items()}
        self.move(seen)
        if rows:
            for key, new in Seen(self.model, self.loss, batch).rows().items():
                self.learn_pair(key, rows[key], new)
        self.k += 1
        return seen.value.item()

    def start(self, own, lambda_a, out):
        A = own["A"]
        own.update(H_a=inverse(A, lambda_a), H_g=torch.eye(out, dtype=A.dtype))
        own.update(s=torch.zeros(out, dtype=A.dtype), y=torch.zeros(out, dtype=A.dtype), pairs=[])
        own["counts"] = {"H_g": 0, "H_a": 0, "powell": 0, "second": 0}

    def learn_pair(self, key, old, new):
        own, (a, g, z), (_, g_new, z_new) = self.state[key], old, new
        for name, after, before in (("s", z_new, z), ("y", g_new, g)):
            change = mean_over_positions(after) - mean_over_positions(before)
            own[name] = self.pair_decay * own[name] + (1 - self.pair_decay) * change
        self.update_h_g(key, own, self.damping**0.5, mean_over_positions(g))
        self.update_h_a(key, own, a, self.damping**0.5)

    def update_h_g(self, key, own, mu_2, gradient):
        """Damp a copy of the averages; take the pair up, or skip it."""
        s, y, H = own["s"], own["y"], own["H_g"]
        if not y @ H @ y > 0:
            return
        s, first = powell(s, y, H)
        if self.convolution(key):
            y, second = y + mu_2 * s, True
        else:
            y, second = second_damping(s, y, mu_2)
        own["counts"]["powell"] += first
        own["counts"]["second"] += second
        if not acceptable(s, y, gradient):
            return
        own["pairs"].append((s, y))
        own["counts"]["H_g"] += 1
        if self.history is None:
            own["H_g"] = inverse_bfgs(H, s, y)
            return
        own["H_g"] = torch.eye(len(s), dtype=s.dtype)
        for pair in own["pairs"][-self.history :]:
            own["H_g"] = inverse_bfgs(own["H_g"], *pair)

    def update_h_a(self, key, own, a, lambda_a):
        """Hessian action: s = H_a x̄, y = (A + lambda_A I) s; of the batch's A for Conv2d."""
        A = input_factor(a) if self.convolution(key) else own["A"]
        x_bar = mean_over_positions(a)
        s = own["H_a"] @ x_bar
        y = A @ s + lambda_a * s
        if acceptable(s, y, x_bar):
            own["H_a"] = inverse_bfgs(own["H_a"], s, y)
            own["action"] = s, y
            own["counts"]["H_a"] += 1

    @property
    def next_P(self):
        return assembled({k: kron(o["H_g"], o["H_a"]) for k, o in self.state.items()})
