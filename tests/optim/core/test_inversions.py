"""Work on factors shared out over the steps of a period, layer by layer."""

import pytest
import torch
from torch import nn

from kronscope.optim import NumericalError
from kronscope.optim.core import inversions as jobs
from kronscope.optim.core import refresher as refresh
from tests.optim.cases import MAKE, batches, takes, train

PERIOD = 4
SHARING = [kind for kind in MAKE if takes(kind, "stagger")]


def four_alike(kind, **settings):
    """Four layers of one shape, one stack, past the steps in which all are solved for."""
    torch.manual_seed(1)
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)])
    opt = MAKE[kind](model, **{**settings, "refresh_every": PERIOD, "stagger": True})
    data = batches(4 * PERIOD)
    train(opt, model, data[: 2 * PERIOD])
    return opt, model, data[2 * PERIOD :]


@pytest.mark.parametrize("kind", SHARING)
def test_layers_of_one_shape_are_not_all_solved_for_at_once(kind, monkeypatch):
    opt, model, data = four_alike(kind)
    solved, original = [], refresh.Refresher.solve

    def spy(self, due):
        due = list(due)
        solved.append(sum(len(job.matrices()) for job in due))
        original(self, due)

    monkeypatch.setattr(refresh.Refresher, "solve", spy)
    train(opt, model, data)
    assert len(solved) == 2 * PERIOD
    assert max(solved) == min(solved) > 0  # of equal work each step has the same
    assert solved[:PERIOD] == solved[PERIOD:]


# EKFAC's values between the eigenvectors change at every step
@pytest.mark.parametrize("kind", [kind for kind in SHARING if not kind.startswith("ekfac")])
def test_each_layer_gets_its_own_results(kind):
    """After a step only what was due has changed, and all of it once a period."""
    opt, model, data = four_alike(kind)
    maps = opt.preconditioner

    def dense():
        eye = {name: torch.eye(P.shape[0]) for name, P in maps().items()}
        return {name: (P @ eye[name]).clone() for name, P in maps().items()}

    before, changed = dense(), []
    for x in data[:PERIOD]:
        train(opt, model, [x])
        now = dense()
        changed.append({name for name in now if not torch.equal(now[name], before[name])})
        before = now
    assert all(0 < len(names) < len(before) for names in changed)
    assert set().union(*changed) == set(before)


def at_rest(opt, model, data):
    """Nothing is learned any more, and all results are of the factors held."""
    for group in opt.param_groups:
        group["decay"] = 1.0
    train(opt, model, data[:PERIOD])


def test_carried_values_are_those_of_the_layer_with_new_eigenvectors():
    opt, model, data = four_alike("ekfac")
    at_rest(opt, model, data)
    before = {name: P @ torch.eye(P.shape[0]) for name, P in opt.curvature().items()}
    opt.state[model[2].weight]["A"].copy_(torch.diag(torch.arange(1.0, 8.0)))
    train(opt, model, data[:PERIOD])
    after = {name: P @ torch.eye(P.shape[0]) for name, P in opt.curvature().items()}
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["2"]
    torch.testing.assert_close(after["2"].trace(), before["2"].trace())  # carrying keeps the sum


def test_the_layer_that_failed_is_named():
    opt, model, data = four_alike("kfac")
    at_rest(opt, model, data)
    opt.state[model[2].weight]["A"].copy_(-torch.eye(7))
    with pytest.raises(NumericalError, match="layer '2': A could not be inverted, 3 times"):
        train(opt, model, data * 2)


def test_offsets_fill_a_period_evenly():
    chosen = jobs.offsets([1.0] * 8, PERIOD)
    assert sorted(chosen) == [0, 0, 1, 1, 2, 2, 3, 3]
