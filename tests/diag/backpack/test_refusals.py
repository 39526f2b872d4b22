"""What the BackPACK engine refuses, by name and with the way out."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from kronscope.diag import Problem, approximations, dense, exact
from kronscope.diag.backpack import quantities as crosscheck
from kronscope.diag.backpack.support import UnsupportedError

INSTEAD = r"use backend='torch\.func'"
LOSS = nn.CrossEntropyLoss()


def problem_of(*layers, loss=LOSS, x=None, t=None):
    model = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
    x = torch.randn(4, 4) if x is None else x
    return Problem(model.eval(), loss, x, torch.tensor([0, 2, 1, 2]) if t is None else t)


def refused(problem, block, message, compute=crosscheck.ggn):
    with pytest.raises(UnsupportedError, match=message):
        compute(problem, problem.block(block))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            nn.GELU(),
            r"SqrtGGNExact does not support layer 'body\.1' \(GELU\); replace it by nn\.ELU, "
            r"nn\.LeakyReLU, .*nn\.ReLU, .*nn\.Tanh, or " + INSTEAD,
        ),
        (nn.LayerNorm(5), r"does not support layer 'body\.1' \(LayerNorm\); " + INSTEAD),
        (nn.ReLU(inplace=True), r"'body\.1' \(ReLU\) working in place; set inplace=False, or use"),
        (nn.Dropout1d(), r"layer 'body\.1' \(Dropout1d\); replace it by nn\.Dropout, or use"),
        (nn.BatchNorm1d(5, affine=False), r"\(Only implemented for affine=True\); modules: Batch"),
    ],
)
def test_unsupported_modules(module, message):
    body = nn.Sequential(nn.Linear(4, 5), module)
    model = nn.Sequential()
    model.add_module("body", body)
    model.add_module("last", nn.Linear(5, 3))
    refused(problem_of(model), "body.0", message)


def test_each_extension_names_itself():
    problem = problem_of(nn.Linear(4, 5), nn.ELU(), nn.Linear(5, 3))
    refused(problem, "0", r"KFRA does not support layer '1' \(ELU\)", crosscheck.kfra)
    refused(problem, "0", r"KFLR does not support layer '1' \(ELU\)", crosscheck.kflr)
    refused(problem, "0", r"KFAC does not support layer '1' \(ELU\)", crosscheck.kfac)
    identity = problem_of(nn.Linear(4, 5), nn.Identity(), nn.Linear(5, 3))
    refused(identity, "0", "DiagHessian does not support layer '1'", crosscheck.diag_hessian)
    refused(identity, "0", "KFRA cannot handle this problem", crosscheck.kfra)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"padding": 1, "padding_mode": "circular"}, "it takes padding_mode='circular' for zeros"),
        ({"padding": "same"}, "it does not know padding='same'; give it as a number"),
    ],
)
@pytest.mark.parametrize("compute", [crosscheck.ggn, crosscheck.empirical_fisher, crosscheck.kflr])
def test_settings_that_backpack_overlooks(keywords, message, compute):
    layers = [nn.Conv1d(1, 2, 3, **keywords), nn.Flatten(), nn.Linear(8, 3)]
    problem = problem_of(*layers, x=torch.randn(4, 1, 4))
    refused(problem, "0", rf"gets layer '0' \(Conv1d\) wrong: {message}.*{INSTEAD}", compute)


def test_average_pooling_with_another_divisor():
    layers = [nn.Conv2d(1, 2, 1), nn.AvgPool2d(2, divisor_override=3), nn.Flatten()]
    problem = problem_of(*layers, nn.Linear(8, 3), x=torch.randn(4, 1, 4, 4))
    refused(problem, "0", "it ignores divisor_override=3; use divisor_override=None")
    crosscheck.empirical_fisher(problem, problem.block("0"))  # no matter to first order


def test_losses():
    layers, t = [nn.Linear(4, 3)], torch.randn(4, 3)
    refused(problem_of(*layers, loss=lambda z, t: (z - t).square().mean(), t=t), "", "as a module")
    message = r"does not support the loss L1Loss; replace it by nn\.BCEWithLogitsLoss\(\), nn\.Cros"
    refused(problem_of(*layers, loss=nn.L1Loss(), t=t), "", message)
    weights = torch.rand(4, 3) + 0.5
    refused(problem_of(*layers, t=weights), "", r"to sum to 1, but they sum to .* normalise them")
    logistic = problem_of(*layers, loss=nn.BCEWithLogitsLoss(), t=torch.ones(4, 3))
    refused(logistic, "", "Only scalar-valued predictions are currently supported")
    smooth = problem_of(*layers, loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    with pytest.raises(ValueError, match="no multiple of the negative log-likelihood"):
        exact.fisher_mc(smooth, smooth.block(""), backend="backpack")


class Wired(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.first, self.inner, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh()
        self.last, self.wiring = nn.Linear(4, 3), forward

    def forward(self, x):
        return self.last(self.wiring(self, self.first(x)))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, h: torch.tanh(m.inner(h)), r"calls 'tanh' outside a module.*nn\.Tanh\(\) for"),
        (lambda m, h: m.inner(h).view(-1, 4), r"calls 'view' outside a module.*nn\.Flatten\(\)"),
        (lambda m, h: m.inner(m.act(m.inner(h))), "cannot take the forward of Wired apart"),
        (lambda m, h: m.inner(h) if h.sum() > 9 else h + m.inner(h), "cannot take the forward"),
        (lambda m, h: m.inner(nn.functional.relu(h, inplace=True)), "'relu' outside a module"),
    ],
)
def test_forwards_that_backpack_cannot_follow(forward, message):
    problem = problem_of(Wired(forward))
    refused(problem, "inner", f"{message}.*{INSTEAD}")


def test_batchgrad_needs_no_more_than_the_blocks_own_layers():
    problem = problem_of(Wired(lambda m, h: h + nn.functional.gelu(m.inner(h))))
    for block in problem.blocks():
        found = exact.empirical_fisher(problem, block, backend="backpack")
        expected = dense(exact.empirical_fisher(problem, block))
        torch.testing.assert_close(dense(found), expected)


def test_layers_that_are_used_twice():
    problem = problem_of(Wired(lambda m, h: m.inner(m.act(m.inner(h)))))
    refused(problem, "inner", "'inner' is called 2 times in one pass", crosscheck.empirical_fisher)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    tied = problem_of(model)
    for compute in (crosscheck.ggn, crosscheck.empirical_fisher, crosscheck.kflr):
        refused(tied, "0", r"'0\.weight' is also '2\.weight'", compute)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_modules_that_look_supported():
    refused(problem_of(nn.Linear(4, 4), Doubled(4, 3)), "1", r"layer '1' \(Doubled\)")
    normed = problem_of(weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3))
    refused(normed, "1", r"\(ParametrizedLinear\)|ParametrizationList")


class Across(nn.Module):
    """Sequences whose layer sees the positions first: as many of them as examples."""

    def __init__(self):
        super().__init__()
        self.layer, self.flatten, self.last = nn.Linear(2, 2), nn.Flatten(), nn.Linear(8, 3)

    def forward(self, x):
        positions_first = torch.tanh(self.layer(x.transpose(0, 1)))
        return self.last(self.flatten(positions_first.transpose(0, 1)))


def test_a_model_that_is_misread_without_a_word():
    """BatchGrad takes the first dimension for the examples; only the guard can tell."""
    problem = problem_of(Across(), x=torch.randn(4, 4, 2))
    message = r"BatchGrad of block 'layer' differs from torch\.func's by .*misreads this model"
    refused(problem, "layer", message, crosscheck.empirical_fisher)


@pytest.mark.parametrize(
    ("compute", "field"),
    [
        (crosscheck.ggn, "sqrt_ggn_exact"),
        (crosscheck.fisher_mc, "sqrt_ggn_exact"),
        (crosscheck.diag_ggn, "diag_ggn_exact"),
        (crosscheck.diag_fisher_mc, "diag_ggn_exact"),
        (crosscheck.diag_hessian, "diag_h"),
        (crosscheck.empirical_fisher, "grad_batch"),
        (crosscheck.kflr, "sqrt_ggn_exact"),
    ],
)
def test_the_guard_sees_one_part_in_a_million(monkeypatch, compute, field):
    run = crosscheck.run

    def slightly_off(*arguments):
        found = run(*arguments)
        found[field] = {name: (1 + 1e-6) * value for name, value in found[field].items()}
        return found

    problem = problem_of(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    compute(problem, problem.block("0"))
    monkeypatch.setattr(crosscheck, "run", slightly_off)
    refused(problem, "0", f"differs from torch.func's by .*{INSTEAD}", compute)


def test_kronecker_refusals():
    problem = problem_of(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    message = r"KFLR needs a block of one Linear or Conv layer; block '1' is BatchNorm1d"
    refused(problem, "1", message, crosscheck.kflr)
    group = problem.group("both", ["0", "2"])
    with pytest.raises(ValueError, match="block 'both' is Linear \\+ Linear"):
        approximations.kfra(problem, group)
    grouped = problem_of(nn.Conv1d(2, 4, 1, groups=2), nn.Flatten(), x=torch.randn(4, 2, 1))
    refused(grouped, "0", "layer '0' has groups=2", crosscheck.kflr)
    with pytest.raises(ValueError, match=r"kflr approximates the 'ggn'.*not 'hessian'"):
        approximations.kflr(problem, problem.block("0"), of="hessian")
    with pytest.raises(ValueError, match="samples must be at least 1, not 0"):
        crosscheck.kfac(problem, problem.block("0"), samples=0)


def test_budget():
    model, x, t = nn.Linear(4, 3), torch.randn(4, 4), torch.randint(3, (4,))
    small = Problem(model, LOSS, x, t, budget=2 * 4 * 3 * 15 * 8 - 1)  # two copies of [4, 3, 15]
    with pytest.raises(ValueError, match=r"roots of block .* \(3 for each of 4 examples\), over"):
        crosscheck.ggn(small, small.block(""))
    crosscheck.fisher_mc(small, small.block(""))
