"""Every truth of every layer against dense autograd written from the definitions, one by one."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from kronscope.diag import Problem, dense, diagonal, exact, frobenius_norm, inner, trace
from kronscope.diag.truths.kronecker_terms import KroneckerTerms
from kronscope.diag.truths.low_rank_terms import LowRankTerms
from kronscope.diag.truths.matrix_free import MatrixFree

N = 4


class Recurrent(nn.Module):
    """A recurrent cell in tensor operations: two Linear layers called at every step."""

    def __init__(self, bias):
        super().__init__()
        self.inward = nn.Linear(2, 3, bias=bias)
        self.around = nn.Linear(3, 3, bias=bias)
        self.out = nn.Linear(3, 3, bias=bias)

    def forward(self, x):
        h = torch.zeros(len(x), 3)
        for t in range(x.shape[1]):
            h = torch.tanh(self.inward(x[:, t]) + self.around(h))
        return self.out(h)


class Tied(nn.Module):
    """The decoder uses the encoder's weight by hand; both heads are one module."""

    def __init__(self, bias):
        super().__init__()
        self.encoder = nn.Linear(4, 3, bias=bias)
        self.head = nn.Linear(4, 3, bias=bias)
        self.again = self.head

    def forward(self, x):
        h = torch.tanh(self.encoder(x)) @ self.encoder.weight
        return self.head(h) + self.again(torch.sigmoid(h))


class Residual(nn.Module):
    """A residual graph of convolutions with batch norm (in eval mode) and an in-place ReLU."""

    def __init__(self, bias):
        super().__init__()
        self.first = nn.Conv2d(1, 2, 2, bias=bias)
        self.norm = nn.BatchNorm2d(2)
        self.second = nn.Conv2d(2, 2, 3, padding=1, bias=bias)
        self.relu = nn.ReLU(inplace=True)
        self.out = nn.Linear(8, 3, bias=bias)

    def forward(self, x):
        h = self.relu(self.norm(self.first(x)))
        return self.out(self.relu(h + self.second(h)).flatten(1))


def sequence(bias):
    return nn.Sequential(
        nn.Linear(2, 3, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3, bias=bias)
    )


def strided(bias):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=2, groups=2, bias=bias),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3, bias=bias),
    )


def padded(bias):
    return nn.Sequential(
        nn.Conv2d(1, 2, (2, 3), padding="same", padding_mode="circular", bias=bias),
        nn.Softplus(),
        nn.Conv2d(2, 2, 2, bias=bias),
        nn.Flatten(),
        nn.Linear(8, 3, bias=bias),
    )


def upward(bias):
    return nn.Sequential(
        nn.Conv1d(2, 2, 2, stride=2, bias=bias),
        nn.GELU(),
        nn.ConvTranspose1d(2, 2, 3, bias=bias),
        nn.Flatten(),
        nn.Linear(8, 3, bias=bias),
    )


def transposed(bias):
    return nn.Sequential(
        nn.ConvTranspose2d(1, 2, 2, stride=2, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)
    )


def embedded(bias):
    return nn.Sequential(
        nn.Embedding(5, 3), nn.LayerNorm(3), nn.Flatten(), nn.Tanh(), nn.Linear(9, 3, bias=bias)
    )


def plain(bias):
    return nn.Sequential(
        nn.Linear(4, 3, bias=bias),
        nn.LayerNorm(3, bias=bias),
        nn.Tanh(),
        nn.Linear(3, 3, bias=bias),
    )


def volume(bias):
    return nn.Sequential(nn.Conv3d(1, 2, 2, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(2, 3))


MODELS = {
    "plain": (plain, (4,)),
    "sequence": (sequence, (3, 2)),
    "recurrent": (Recurrent, (3, 2)),
    "tied": (Tied, (4,)),
    "residual": (Residual, (1, 3, 3)),
    "strided": (strided, (2, 5, 5)),
    "padded": (padded, (1, 3, 3)),
    "upward": (upward, (2, 4)),
    "transposed": (transposed, (1, 2, 2)),
    "embedded": (embedded, (3,)),
    "volume": (volume, (1, 2, 2, 2)),
}


def half_squares(z, t):
    return (z - t).square().sum() / 2 / len(z)


def summed_logistic(z, t):
    return binary_cross_entropy_with_logits(z, t, reduction="sum") / len(z)


LOSSES = {
    "mse": (mse_loss, lambda: torch.randn(N, 3)),  # a mean over outputs too: factor 2/3
    "half-mse": (half_squares, lambda: torch.randn(N, 3)),
    "cross-entropy": (cross_entropy, lambda: torch.randint(3, (N,))),
    "logistic": (nn.BCEWithLogitsLoss(), lambda: torch.rand(N, 3).round()),
    "summed logistic": (summed_logistic, lambda: torch.rand(N, 3).round()),
}
# every loss with one model of each way back to the layers, two losses with the others
PAIRS = [*product(("plain", "sequence", "residual"), LOSSES)]
for model, other in zip([m for m in MODELS if m not in dict(PAIRS)], 2 * [*LOSSES], strict=False):
    PAIRS += [(model, loss) for loss in dict.fromkeys(("cross-entropy", other))]
CASES = [(*case, index % 2 == 0) for index, case in enumerate(PAIRS)]


def problem_of(model, loss, bias):
    torch.manual_seed(0)
    make, shape = MODELS[model]
    function, targets = LOSSES[loss]
    inputs = torch.randint(5, (N, *shape)) if model == "embedded" else torch.randn(N, *shape)
    network = make(bias)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics and scales that do something
            module.running_mean, module.running_var = torch.randn(2), 0.5 + torch.rand(2)
            nn.init.normal_(module.weight)
    return Problem(network.eval(), function, inputs, targets())


def by_definition(problem, block):
    """{truth: [d, d]} from Jacobians and Hessians of one example after another."""
    at = torch.zeros(block.d)

    def outputs(v):
        moved = {n: problem.model.get_parameter(n) + s for n, s in block.split(v).items()}
        return functional_call(problem.model, moved, (problem.inputs,), tie_weights=False)

    def loss_of(n, z):
        return problem.loss(z[None], problem.targets[n : n + 1])

    z = outputs(at).detach()
    J = jacobian(outputs, at)  # [n, c, d]
    found = dict.fromkeys(("ggn", "fisher", "empirical_fisher"), 0.0)
    for n in range(N):
        H = hessian(lambda own, n=n: loss_of(n, own), z[n])
        g = J[n].T @ jacobian(lambda own, n=n: loss_of(n, own), z[n])
        found["ggn"] = found["ggn"] + J[n].T @ H @ J[n] / N
        found["fisher"] = found["fisher"] + J[n].T @ expected_scores(problem, z[n]) @ J[n] / N
        found["empirical_fisher"] = found["empirical_fisher"] + torch.outer(g, g) / N
    found["hessian"] = hessian(lambda v: problem.loss(outputs(v), problem.targets), at)
    return found


def expected_scores(problem, z):
    """E over the model's labels of score scoreᵀ, [c, c], times the loss's multiple of -log p."""
    c, loss = len(z), problem.loss
    if loss is cross_entropy:  # every label in turn
        p = z.softmax(0)
        scores = p - torch.eye(c)
        return torch.einsum("k,ki,kj->ij", p, scores, scores)
    if loss in (half_squares, mse_loss):  # unit normal: E (z-t)(z-t)ᵀ = I; mse is 2/c times it
        return torch.eye(c) * (1.0 if loss is half_squares else 2 / c)
    p, total = z.sigmoid(), 0.0
    for labels in product((0.0, 1.0), repeat=c):  # every combination of labels
        t = torch.tensor(labels)
        score = p - t
        total = total + (p**t * (1 - p) ** (1 - t)).prod() * torch.outer(score, score)
    return total if loss is summed_logistic else total / c


@pytest.mark.parametrize(("model", "loss", "bias"), CASES, ids=lambda v: str(v))
def test_every_truth_of_every_layer(model, loss, bias):
    problem = problem_of(model, loss, bias)
    blocks = problem.blocks()
    assert len(blocks) >= 2
    for block in blocks:
        for of, expected in by_definition(problem, block).items():
            found = exact.truth(problem, block, of)
            # float64 through two orders of differentiation: well below 1e-9 of the largest entry
            slack = 1e-10 * expected.abs().max().item() + 1e-14
            torch.testing.assert_close(dense(found), expected, rtol=0, atol=slack)
            assert trace(found) == pytest.approx(expected.trace().item(), rel=1e-9, abs=1e-13)


def test_there_are_enough_variants():
    assert {model for model, *_ in CASES} == set(MODELS)
    for loss in LOSSES:
        assert {bias for _, own, bias in CASES if own == loss} == {True, False}


@pytest.mark.parametrize("model", ["residual", "recurrent", "strided", "tied"])
def test_tensors_units_and_groups(model):
    problem = problem_of(model, "cross-entropy", True)
    layers = problem.blocks()
    groups = problem.blocks("group", {"both": [layers[0].name, layers[-1].name]})
    for block in [*problem.blocks("tensor"), *problem.blocks("unit"), *groups]:
        for of, expected in by_definition(problem, block).items():
            found = dense(exact.truth(problem, block, of))
            slack = 1e-10 * expected.abs().max().item() + 1e-14
            torch.testing.assert_close(found, expected, rtol=0, atol=slack)


def test_kernel_slices_are_units_of_a_convolution():
    problem = problem_of("strided", "mse", True)
    names = [block.name for block in problem.blocks("unit")]
    assert names[:3] == ["0[0,0]", "0[0,bias]", "0[1,0]"]  # two groups of one input channel each
    assert problem.block("0[3,0]").d == 9
    whole = dense(exact.ggn(problem, problem.block("0")))
    part = dense(exact.ggn(problem, problem.block("0[3,0]")))
    torch.testing.assert_close(part, whole[30:39, 30:39])  # row 3 of [4, 9 + 1]


def test_the_kinds_of_truths():
    problem = problem_of("residual", "cross-entropy", True)
    kinds = {block.name: type(exact.ggn(problem, block)) for block in problem.blocks()}
    assert kinds == {
        "first": LowRankTerms,
        "norm": LowRankTerms,
        "second": LowRankTerms,
        "out": KroneckerTerms,
    }


def test_sampled_labels_of_shared_layers_average_to_the_fisher():
    problem = problem_of("padded", "cross-entropy", True)
    block, generator = problem.block("0"), torch.Generator().manual_seed(0)
    expected = dense(exact.fisher(problem, block))
    found = dense(exact.fisher_mc(problem, block, samples=4000, generator=generator))
    # 16,000 labels: a relative standard error of about 1/√16000 times a few
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_many_blocks_in_one_sweep_are_what_each_is_alone():
    for of in ("ggn", "empirical_fisher", "hessian"):
        one, other = (problem_of("residual", "mse", True) for _ in range(2))
        for block, truth in exact.truths(one, one.blocks(), of):
            torch.testing.assert_close(dense(truth), dense(exact.truth(other, block, of)))


def test_a_narrow_layer_condenses_the_roots():
    """20 outputs behind a code of 2: the roots of what lies before the code are 2, not 20."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 17), nn.Tanh(), nn.Linear(17, 2), nn.Tanh(), nn.Linear(2, 20)
    )
    problem = Problem(model, half_squares, torch.randn(5, 6), torch.randn(5, 20))
    found = exact.ggn(problem, problem.block("0"))
    assert found.left.roots.shape == (5, 2, 17)
    expected = by_definition_ggn(problem, problem.block("0"))
    torch.testing.assert_close(dense(found), expected, rtol=0, atol=1e-12)


def by_definition_ggn(problem, block):
    at = block.join({n: problem.model.get_parameter(n) for n in block.parameters})
    J = jacobian(
        lambda v: functional_call(
            problem.model, block.split(v), (problem.inputs,), tie_weights=False
        ),
        at,
    )
    return torch.einsum("ncd,nce->de", J, J) / problem.n


def test_a_loss_that_is_not_convex_in_the_outputs():
    """Its GGN has no real roots: products give it, indefinite as it is."""

    def sines(z, t):
        return torch.sin(z - t).sum() / len(z)

    for model in ("plain", "residual"):
        make, shape = MODELS[model]
        problem = Problem(make(True).eval(), sines, torch.randn(N, *shape), torch.randn(N, 3))
        for block in problem.blocks():
            at = block.join({n: problem.model.get_parameter(n) for n in block.parameters})
            J = jacobian(
                lambda v, p=problem, b=block: functional_call(p.model, b.split(v), (p.inputs,)), at
            )
            z = problem.model(problem.inputs)
            H = torch.diag_embed(-torch.sin(z - problem.targets))
            expected = torch.einsum("nci,ncd,ndj->ij", J, H, J) / N
            torch.testing.assert_close(dense(exact.ggn(problem, block)), expected)


def test_beyond_the_dense_size_products_and_no_matrix(monkeypatch):
    monkeypatch.setattr(exact, "DENSE_UP_TO", 10)
    problem = problem_of("residual", "cross-entropy", True)
    block = problem.block("second")
    truth = exact.hessian(problem, block)
    assert isinstance(truth, MatrixFree)
    expected = by_definition(problem, block)["hessian"]
    torch.testing.assert_close(truth @ torch.eye(block.d), expected)
    torch.testing.assert_close(truth @ torch.ones(block.d), expected.sum(1))


def test_gram_inners_and_quadratic_of_every_kind():
    problem = problem_of("sequence", "cross-entropy", True)
    for block in problem.blocks():
        truth = exact.ggn(problem, block)
        terms = []
        for n in range(N):
            terms.append(dense(exact.ggn(reopened(problem, slice(n, n + 1)), block)))
        gram = torch.stack([torch.stack([(a * b).sum() for a in terms]) for b in terms])
        torch.testing.assert_close(truth.gram, gram)
        u, v = torch.randn(2, block.d)
        quadratic = torch.stack([u @ term @ v for term in terms])
        torch.testing.assert_close(truth.quadratic(u, v), quadratic)
        torch.testing.assert_close(diagonal(truth), dense(truth).diagonal())
        assert frobenius_norm(truth) == pytest.approx(dense(truth).norm().item())
        assert inner(truth, truth) == pytest.approx(gram.mean().item())


def reopened(problem, rows):
    """The same model and loss on some of the examples."""
    model = MODELS["sequence"][0](True)
    model.load_state_dict(problem.model.state_dict())
    return Problem(model, problem.loss, problem.inputs[rows], problem.targets[rows])


def test_a_budget_too_small_for_columns_gives_a_dense_or_a_matrix_free_truth():
    problem = problem_of("residual", "mse", True)
    expected = dense(exact.ggn(problem, problem.block("first")))
    tight = problem_of("residual", "mse", True)
    # bytes: half of it holds no 4 x 3 columns of 10 with positions, a quarter holds 10 x 10
    tight.budget = 3400
    found = exact.ggn(tight, tight.block("first"))
    assert not isinstance(found, LowRankTerms)
    torch.testing.assert_close(dense(found), expected)
