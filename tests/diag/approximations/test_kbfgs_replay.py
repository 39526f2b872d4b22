"""K-BFGS replayed: against slow loops, against the optimizer, and where theory says what comes."""

import pytest
import torch
from torch import nn

from kronscope import optim
from kronscope.diag import Kronecker, Problem, approximations, dense, exact, metrics
from kronscope.diag.approximations._kbfgs.passes import seen_layers, trial
from kronscope.diag.approximations._kbfgs.replay import COUNTS, Replay, replay_state, replayed
from kronscope.diag.operators import inverse

# -- the whole replay, once more, one example and one position after the other ------------------


def slow_replay(network, w_bars, data, loss, by_rows, replay):
    """[(H_g, H_a)] per layer. network(w_bars, x, probes) -> inputs a [T][i], outputs z [T][o], out.

    Each z has its probe (zero) added, so that the loss's gradient at the probes is g.
    """
    xs, ts = data

    def one(bars, n):
        probes = [torch.zeros(shape, requires_grad=True) for shape in network.shapes]
        a, z, out = network(bars, xs[n], probes)
        g = torch.autograd.grad(loss(out[None], ts[n : n + 1]), probes)
        return [v.detach() for v in a], [v.detach() for v in z], g

    def average(terms):
        total = torch.zeros_like(terms[0])
        for term in terms:
            total = total + term
        return total / len(terms)

    def second_moment(rows, k):  # sum over positions, mean over examples
        return average([sum(torch.outer(v, v) for v in one(w_bars, n)[0][k]) for n in rows])

    layers, n_all = range(len(w_bars)), range(len(xs))
    root = replay.damping**0.5
    A = [second_moment(n_all, k) for k in layers]
    H_a = [torch.linalg.inv(A[k] + root * torch.eye(len(A[k]))) for k in layers]
    H_g = [torch.eye(len(w)) for w in w_bars]
    M = [torch.zeros_like(w) for w in w_bars]
    S, Y = ([torch.zeros(len(w)) for w in w_bars] for _ in range(2))
    for step, batch in enumerate(replay.minibatches(len(xs))):
        rows = batch.tolist()
        old = {n: one(w_bars, n) for n in rows}
        moved = []
        for k in layers:
            grads = [
                sum(torch.outer(g, a) for g, a in zip(old[n][2][k], old[n][0][k], strict=True))
                for n in rows
            ]
            M[k] = 0.9 * M[k] + 0.1 * average(grads)
            moved.append(w_bars[k] - replay.lr * H_g[k] @ M[k] @ H_a[k])
        new = {n: one(moved, n) for n in rows}
        for k in layers:
            current = second_moment(rows, k)
            if by_rows[k] and step > 0:
                A[k] = 0.9 * A[k] + 0.1 * current
            x = average([average(list(old[n][0][k])) for n in rows])
            s_a = H_a[k] @ x
            y_a = (A[k] if by_rows[k] else current) @ s_a + root * s_a
            H_a[k] = slow_bfgs(H_a[k], s_a, y_a)

            def mean(part, which, k=k, rows=rows):
                return average([average(list(which[n][part][k])) for n in rows])

            decay = 0.9 if len(rows) < len(xs) else 0.0
            S[k] = decay * S[k] + (1 - decay) * (mean(1, new) - mean(1, old))
            Y[k] = decay * Y[k] + (1 - decay) * (mean(2, new) - mean(2, old))
            s, y = S[k], Y[k]
            if s @ y <= 0.2 * y @ H_g[k] @ y:
                theta = 0.8 * y @ H_g[k] @ y / (y @ H_g[k] @ y - s @ y)
                s = theta * s + (1 - theta) * H_g[k] @ y
            if not by_rows[k]:
                y = y + root * s
            elif s @ y <= root * s @ s:
                theta = (1 - root) * s @ s / (s @ s - s @ y)
                y = theta * y + (1 - theta) * s
            assert s @ y > 1e-4 * s @ s * mean(2, old).norm()  # nothing to skip in these cases
            H_g[k] = slow_bfgs(H_g[k], s, y)
    return list(zip(H_g, H_a, strict=True))


def slow_bfgs(H, s, y):
    rho = 1 / (s @ y)
    turn = torch.eye(len(s)) - rho * torch.outer(s, y)
    return turn @ H @ turn.T + rho * torch.outer(s, s)


def homogeneous(v):
    return torch.cat([v, torch.ones(1)])


class SlowMLP:
    """Linear layers with tanh between, each with one position."""

    def __init__(self, sizes):
        self.shapes = [(1, size) for size in sizes[1:]]

    def __call__(self, w_bars, x, probes):
        inputs, outputs = [], []
        for k, (W, probe) in enumerate(zip(w_bars, probes, strict=True)):
            inputs.append(homogeneous(x if k == 0 else x.tanh())[None])
            outputs.append(inputs[-1] @ W.T + probe)
            x = outputs[-1][0]
        return inputs, outputs, x


class SlowCNN:
    """Conv 2->3, 2x2, stride 1, padding 1; tanh; conv 3->2 without bias, 2x2, stride 2; Linear."""

    shapes = ((16, 3), (4, 2), (1, 3))

    def __call__(self, w_bars, x, probes):
        padded = torch.zeros(2, 5, 5)
        padded[:, 1:4, 1:4] = x
        first = self.windows(padded, 4, 1)
        a = [torch.stack([homogeneous(v) for v in first])]
        z = [a[0] @ w_bars[0].T + probes[0]]
        image = z[0].T.reshape(3, 4, 4).tanh()
        a.append(torch.stack(self.windows(image, 2, 2)))
        z.append(a[1] @ w_bars[1].T + probes[1])
        a.append(homogeneous(z[1].T.reshape(-1).tanh())[None])
        z.append(a[2] @ w_bars[2].T + probes[2])
        return a, z, z[2][0]

    @staticmethod
    def windows(image, count, stride):
        corners = [(stride * r, stride * c) for r in range(count) for c in range(count)]
        return [image[:, r : r + 2, c : c + 2].reshape(-1) for r, c in corners]


class SlowSequence:
    """A Linear layer at each of 4 positions, tanh, mean over positions, Linear."""

    shapes = ((4, 3), (1, 2))

    def __call__(self, w_bars, x, probes):
        a = [torch.stack([homogeneous(row) for row in x])]
        z = [a[0] @ w_bars[0].T + probes[0]]
        a.append(homogeneous(z[0].tanh().mean(0))[None])
        z.append(a[1] @ w_bars[1].T + probes[1])
        return a, z, z[1][0]


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def cnn():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 2, 2, stride=2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    data = torch.randn(6, 2, 3, 3), torch.randint(3, (6,))
    return Problem(model, nn.CrossEntropyLoss(), *data)


def sequence():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), Mean(), nn.Linear(3, 2))
    return Problem(model, nn.CrossEntropyLoss(), torch.randn(7, 4, 3), torch.randint(2, (7,)))


def tanh_net(n=40):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    return Problem(model, nn.CrossEntropyLoss(), torch.randn(n, 6), torch.randint(3, (n,)))


def w_bars(problem):
    return [
        block.join({name: problem.model.get_parameter(name) for name in block.parameters}).reshape(
            block.single.matrix_shape
        )
        for block in problem.blocks()
    ]


SLOW = {
    "mlp": (lambda: tanh_net(9), SlowMLP([6, 5, 4, 3]), (True, True, True)),
    "cnn": (cnn, SlowCNN(), (False, False, True)),
    "sequence": (sequence, SlowSequence(), (False, True)),
}
REPLAYS = {
    "minibatches": Replay(damping=0.3, steps=5, batch=4),
    "full batch": Replay(damping=0.05, steps=3, batch=None),
    "long trial steps": Replay(damping=0.01, steps=4, batch=3, lr=3.0, seed=5),
}


@pytest.mark.parametrize("settings_name", REPLAYS)
@pytest.mark.parametrize("name", SLOW)
def test_the_replay_equals_a_slow_loop_over_examples_and_positions(name, settings_name):
    make, network, by_rows = SLOW[name]
    problem, replay = make(), REPLAYS[settings_name]
    if settings_name == "full batch":
        replay = Replay(damping=0.05, steps=3, batch=problem.n)
    data = problem.inputs, problem.targets
    expected = slow_replay(network, w_bars(problem), data, problem.loss, by_rows, replay)
    for block, (H_g, H_a) in zip(problem.blocks(), expected, strict=True):
        state = replay_state(problem, block, replay)
        # y is a difference of nearly equal numbers: lr 0.01 leaves about 11 of 16 digits
        torch.testing.assert_close(state.H_g, H_g, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(state.H_a, H_a, rtol=1e-9, atol=1e-10)


def test_the_slow_cases_meet_every_damping():
    """Otherwise the agreement above would leave branches out."""
    seen = set()
    for make, _, _ in SLOW.values():
        problem = make()
        for replay in REPLAYS.values():
            for state in replayed(problem, replay).values():
                seen |= {name for name in COUNTS if state.counts[name]}
    assert {"pairs accepted", "first damping fired", "second damping fired"} <= seen


def test_the_optimizer_held_at_the_same_point_has_the_same_state():
    """Two independent readings of the paper: `optim.KBFGS`, put back to θ after every step."""
    problem, replay = tanh_net(), Replay(damping=0.1, steps=30, batch=10, lr=0.02, seed=3)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    theta = {name: t.clone() for name, t in problem.model.state_dict().items()}
    model.load_state_dict(theta)
    opt = optim.KBFGS(model, lr=replay.lr, damping=replay.damping)

    def closure(rows):
        opt.zero_grad()
        loss = problem.loss(model(problem.inputs[rows]), problem.targets[rows])
        loss.backward()
        return loss

    opt.warm_up([lambda: closure(slice(None))])
    for rows in replay.minibatches(problem.n):
        opt.step(lambda rows=rows: closure(rows))
        model.load_state_dict(theta)
    live = opt.preconditioner()
    for block in problem.blocks():
        state = replay_state(problem, block, replay)
        # the same differences of nearly equal numbers, summed in another order
        torch.testing.assert_close(state.H_g, live[block.name].left, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(state.H_a, live[block.name].right, rtol=1e-9, atol=1e-10)


# -- where theory says what comes out ------------------------------------------------------------


@pytest.mark.parametrize("make", [tanh_net, cnn, sequence])
def test_full_batches_leave_h_a_the_exact_inverse(make):
    problem = make()
    replay = Replay(damping=0.2, steps=8, batch=problem.n)
    for block in problem.blocks():
        state = replay_state(problem, block, replay)
        damped = state.A + 0.2**0.5 * torch.eye(len(state.A))
        torch.testing.assert_close(state.H_a @ damped, torch.eye(len(damped)), atol=1e-9, rtol=0)
        assert state.counts["actions accepted"] == 8


def test_a_of_a_convolution_is_the_sum_over_positions_of_all_examples():
    problem = cnn()
    block = problem.blocks()[0]
    start, later = (replay_state(problem, block, Replay(steps=k)).A for k in (1, 9))
    assert start[-1, -1] == pytest.approx(16)  # 4 x 4 positions, a 1 in every patch
    assert torch.equal(start, later)


def test_the_skip_rule_is_given_the_gradient_before_the_step():
    problem = tanh_net()
    seen, every = seen_layers(problem), torch.arange(problem.n)
    shifts = {name: torch.ones_like(t) for name, t in problem.model.named_parameters()}
    for block, change in zip(problem.blocks(), trial(problem, seen, every, shifts), strict=True):
        bias = problem.gradient(block).reshape(block.single.matrix_shape)[:, -1]
        torch.testing.assert_close(change.slope, bias)


def bent(Q):
    """½ (z - t)ᵀ Q (z - t), the mean over examples: curvature Q at the outputs."""
    return lambda z, t: 0.5 * torch.einsum("no,op,np->n", z - t, Q, z - t).mean()


def test_on_a_quadratic_h_g_becomes_the_inverse():
    """Undamped pairs obey y = Q s exactly, so that BFGS finds Q⁻¹, in the end superlinearly."""
    Q = torch.diag(torch.tensor([0.6, 1.0, 1.7])) + 0.2
    model = nn.Sequential(nn.Linear(4, 3))
    problem = Problem(model, bent(Q), torch.randn(60, 4), 2 * torch.randn(60, 3))
    block = problem.block("0")
    state = replay_state(problem, block, Replay(damping=0.01, steps=400, batch=1))
    assert state.counts["first damping fired"] == state.counts["second damping fired"] == 0
    assert state.counts["pairs accepted"] == 400
    torch.testing.assert_close(state.H_g @ Q, torch.eye(3), atol=1e-8, rtol=0)
    found = approximations.kbfgs(problem, block, damping=0.01, steps=400, batch=1)
    torch.testing.assert_close(found.left, Q, atol=1e-8, rtol=0)


def test_on_a_quadratic_nothing_is_learned_outside_the_visited_subspace():
    """Outputs 0 and 1 have no residual: every s and y vanishes there, and H_g stays I.

    Curvature there is 1.5: from 2 on BFGS would double rounding's share in these at every step.
    """
    Q = torch.zeros(4, 4)
    Q[:2, :2], Q[2:, 2:] = 1.5 * torch.eye(2), torch.tensor([[1.5, 0.4], [0.4, 0.8]])
    model = nn.Sequential(nn.Linear(4, 4))
    inputs = torch.randn(60, 4)
    targets = model(inputs).detach()
    targets[:, 2:] += torch.randn(60, 2)
    problem = Problem(model, bent(Q), inputs, targets)
    replay = Replay(damping=0.01, steps=150, batch=1)
    state = replay_state(problem, problem.block("0"), replay)
    expected = torch.eye(4)
    expected[2:, 2:] = torch.linalg.inv(Q[2:, 2:])
    torch.testing.assert_close(state.H_g, expected, atol=1e-8, rtol=0)


def test_the_last_pair_is_a_secant_pair():
    """H_g y = s for the averaged pair, which nothing had to damp here."""
    Q = torch.diag(torch.tensor([0.6, 1.0, 1.7]))
    model = nn.Sequential(nn.Linear(4, 3))
    problem = Problem(model, bent(Q), torch.randn(20, 4), torch.randn(20, 3))
    state = replay_state(problem, problem.block("0"), Replay(damping=0.01, steps=4))
    assert state.counts["first damping fired"] == state.counts["second damping fired"] == 0
    torch.testing.assert_close(state.H_g @ state.y, state.s, rtol=1e-9, atol=1e-15)


def test_what_was_learned_is_closer_to_the_hessian_than_the_start():
    problem = tanh_net(200)
    block = problem.block("0")
    truth = exact.hessian(problem, block)
    found = approximations.kbfgs(problem, block, steps=50)
    state = replay_state(problem, block, Replay(steps=50))
    unlearned = inverse(Kronecker(torch.eye(5), state.H_a))
    learned, start = (
        metrics.relative_error_best_scale(truth, operator).value for operator in (found, unlearned)
    )
    assert learned < 0.8 * start < 0.8
    undone = dense(found) @ dense(Kronecker(state.H_g, state.H_a.contiguous()))
    torch.testing.assert_close(undone, torch.eye(35), atol=1e-9, rtol=0)


# -- manners --------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_state_and_another_seed_another():
    states = [
        replay_state(p, p.block("0"), replay)
        for replay in (Replay(steps=5), Replay(steps=5), Replay(steps=5, seed=1))
        for p in [(torch.manual_seed(0), tanh_net())[1]]
    ]
    assert torch.equal(states[0].H_g, states[1].H_g)
    assert torch.equal(states[0].H_a, states[1].H_a)
    assert not torch.equal(states[0].H_g, states[2].H_g)


def test_nothing_is_disturbed():
    problem = cnn()
    before = {name: t.clone() for name, t in problem.model.state_dict().items()}
    flags = [p.requires_grad for p in problem.model.parameters()]
    random = torch.get_rng_state()
    with torch.no_grad():  # whoever asks
        replayed(problem, Replay(steps=3))
    assert torch.equal(torch.get_rng_state(), random)
    for name, t in problem.model.state_dict().items():
        assert torch.equal(t, before[name])
    assert [p.requires_grad for p in problem.model.parameters()] == flags
    assert all(p.grad is None for p in problem.model.parameters())
    assert not any(m._forward_hooks or m.training for m in problem.model.modules())


def test_the_problem_keeps_a_replay():
    problem = tanh_net()
    assert replayed(problem, Replay(steps=3)) is replayed(problem, Replay(steps=3))
    assert replayed(problem, Replay(steps=3)) is not replayed(problem, Replay(steps=4))


class Affine(nn.Module):
    """What BatchNorm1d does in eval mode, without parameters."""

    def __init__(self, norm):
        super().__init__()
        self.scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        self.shift = norm.bias.detach() - norm.running_mean * self.scale

    def forward(self, x):
        return x * self.scale + self.shift


def test_other_parameters_stay_where_they_are():
    norm = nn.BatchNorm1d(5).eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 2)
    first, last = nn.Linear(6, 5), nn.Linear(5, 3)
    data = torch.randn(20, 6), torch.randint(3, (20,))
    with_norm, without = (
        Problem(nn.Sequential(first, middle, nn.Tanh(), last).eval(), nn.CrossEntropyLoss(), *data)
        for middle in (norm, Affine(norm))
    )
    for name in ("0", "3"):
        found, expected = (
            replay_state(p, p.block(name), Replay(steps=6)) for p in (with_norm, without)
        )
        torch.testing.assert_close(found.H_g, expected.H_g, rtol=1e-7, atol=1e-8)


def test_frozen_parts_of_a_layer_have_no_column():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    problem = Problem(model, nn.CrossEntropyLoss(), torch.randn(8, 4), torch.randint(2, (8,)))
    shapes = [replay_state(problem, b, Replay(steps=3)).M.shape for b in problem.blocks()]
    assert shapes == [(3, 4), (2, 1)]
    for block in problem.blocks():
        assert approximations.kbfgs(problem, block, steps=3).shape == (block.d, block.d)


class RootBelowTwo(nn.Module):
    def forward(self, z):
        return (2 - z).sqrt()


def test_pairs_that_are_not_finite_are_counted_and_leave_no_trace():
    """Descent raises z: example 0, at z = 2 - 1e-8, passes 2 in every trial, the others never."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), RootBelowTwo())
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    inputs = torch.ones(8, 1)
    inputs[0] = 2 - 1e-8
    problem = Problem(model, lambda out, _t: out.mean(), inputs, torch.zeros(8, 1))
    replay = Replay(steps=20, batch=2, lr=1e-4)
    hit = sum(0 in rows.tolist() for rows in replay.minibatches(8))
    state = replay_state(problem, problem.block("0"), replay)
    assert 0 < hit < 20
    assert state.counts["pairs not finite"] == state.counts["pairs skipped"] == hit
    assert state.counts["pairs accepted"] == 20 - hit
    assert all(torch.isfinite(t).all() for t in (state.H_g, state.H_a, state.s, state.y))


def test_every_pair_is_counted():
    problem = tanh_net()
    for state in replayed(problem, Replay(steps=12)).values():
        assert state.counts["pairs accepted"] + state.counts["pairs skipped"] == 12
        assert state.counts["actions accepted"] + state.counts["actions skipped"] == 12


def test_nothing_learned_is_an_error(network):
    model, inputs = network([4, 3, 2], nn.Tanh), torch.randn(8, 4)
    solved = Problem(model, nn.MSELoss(), inputs, model(inputs).detach())
    with pytest.raises(RuntimeError, match=r"learned nothing of layer '2'.* 50 pairs.* 0 were not"):
        approximations.kbfgs(solved, solved.block("2"))
    steep = network([4, 3, 2], nn.ReLU)  # a product of two long trial steps overflows
    problem = Problem(steep, nn.MSELoss(), inputs, torch.randn(8, 2))
    far = Replay(steps=3, lr=1e200)
    with pytest.raises(RuntimeError, match=r"'2'.* 3 pairs.* 3 were not finite.*lr than 1e\+200"):
        replay_state(problem, problem.block("2"), far)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": 0.0}, "damping > 0 and finite, not 0.0"),
        ({"damping": float("nan")}, "damping > 0 and finite, not nan"),
        ({"steps": 0}, "steps > 0 and finite, not 0"),
        ({"batch": -1}, "batch > 0 and finite, not -1"),
        ({"batch": 41}, "a minibatch of 41 examples, but the problem has only 40"),
    ],
)
def test_bad_settings(settings, message):
    problem = tanh_net()
    with pytest.raises(ValueError, match=message):
        approximations.kbfgs(problem, problem.block("0"), **settings)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(self.inner(x).tanh())


def test_blocks_without_a_state():
    problem = tanh_net()
    both = problem.group("both", ["0", "2"])
    for block, reason in [
        (both, "'both': it is a group of 2 layers"),
        (problem.block("0.weight"), "'0.weight': it is not the whole of layer '0'"),
        (problem.block("0[1]"), r"'0\[1\]': it is not the whole of layer '0'"),
    ]:
        with pytest.raises(ValueError, match=reason + r".*\['0', '2', '4'\]"):
            approximations.kbfgs(problem, block)
    with pytest.raises(ValueError, match="kbfgs approximates the hessian, not 'ggn'"):
        approximations.kbfgs(problem, problem.block("0"), of="ggn")


def test_layers_without_a_state():
    data = torch.randn(6, 2, 3, 3), torch.randint(3, (6,))
    grouped = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 3))
    problem = Problem(grouped, nn.CrossEntropyLoss(), *data)
    with pytest.raises(ValueError, match=r"'0': a convolution in 2 groups.*\['2'\]"):
        approximations.kbfgs(problem, problem.block("0"))
    assert approximations.kbfgs(problem, problem.block("2")).shape == (51, 51)
    data = torch.randn(6, 4), torch.randint(4, (6,))
    normed = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    problem = Problem(normed, nn.CrossEntropyLoss(), *data)
    with pytest.raises(ValueError, match=r"'0': no Linear, Conv1d or Conv2d layer.*\['1'\]"):
        approximations.kbfgs(problem, problem.block("0"))
    problem = Problem(Twice(), nn.CrossEntropyLoss(), *data)
    with pytest.raises(ValueError, match=r"layer 'inner' is called 2 times per pass.*: \[\]"):
        approximations.kbfgs(problem, problem.block("inner"))
