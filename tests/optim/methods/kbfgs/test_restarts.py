"""K-BFGS gives up a factor that is no longer positive definite, and begins it anew."""

import pytest
import torch

from kronscope.optim import KBFGS
from kronscope.optim.core.errors import NumericalError
from kronscope.optim.core.refresher import PATIENCE
from kronscope.optim.methods.kbfgs import restarts
from tests.optim.cases import count, train
from tests.optim.models import CASES

INJECTED = {"indefinite": lambda H: H.mul_(-1.0), "nan": lambda H: H.fill_(torch.nan)}
LAYER = {"mlp": "2", "cnn": "2", "shared": "mix"}  # of the CNN one with two groups


def trained(name, steps, **settings):
    case = CASES[name](count=20)
    opt = KBFGS(case.model, **{"lr": 0.1, "damping": 0.5, **settings})
    train(opt, case.model, case.batches[:steps], case.loss)
    return case, opt, case.model.get_submodule(LAYER[name]).weight


def is_positive_definite(H):
    return bool((torch.linalg.eigvalsh(H) > 0).all())


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("factor", ["H_g", "H_a"])
@pytest.mark.parametrize("how", sorted(INJECTED))
def test_a_broken_factor_begins_anew(name, factor, how):
    case, opt, weight = trained(name, 4)
    other = "H_a" if factor == "H_g" else "H_g"
    INJECTED[how](opt.state[weight][factor])
    train(opt, case.model, case.batches[4:5], case.loss)
    kept = opt.state[weight][other].clone()
    assert torch.isfinite(torch.cat([p.flatten() for p in case.model.parameters()])).all()
    assert opt.state[weight]["broken"].any()
    train(opt, case.model, case.batches[5:9], case.loss)
    groups = getattr(case.model.get_submodule(LAYER[name]), "groups", 1)
    assert count(opt, weight, f"{factor} restarted") == groups
    assert count(opt, weight, f"{other} restarted") == 0
    assert is_positive_definite(opt.state[weight][factor])
    assert not opt.state[weight]["broken"].any()
    assert not opt.state[weight]["restarts"].any()  # what followed was fine
    assert not torch.equal(opt.state[weight][other], kept)  # and the other went on learning
    assert f"{factor} restarted {groups}" in opt.summary()


def test_h_a_begins_at_the_inverse_of_its_average(monkeypatch):
    case, opt, weight = trained("mlp", 4)
    opt.state[weight]["H_a"].mul_(-1.0)
    train(opt, case.model, case.batches[4:5], case.loss)
    seen, original = {}, restarts.start_h_a

    def spy(stack, blocks, A, lambda_a):
        original(stack, blocks, A, lambda_a)
        (block,) = blocks
        A = stack.of(block, "A")[0]
        wanted = torch.linalg.inv(A + 0.5**0.5 * torch.eye(len(A)))
        torch.testing.assert_close(stack.of(block, "H_a")[0], wanted)
        seen[block.name] = True

    monkeypatch.setattr(restarts, "start_h_a", spy)
    train(opt, case.model, case.batches[5:6], case.loss)
    assert seen == {"2": True}


def test_an_inverse_history_is_emptied():
    case, opt, weight = trained("mlp", 6, history=3)
    opt.state[weight]["Y"].mul_(-1.0)
    opt.state[weight]["R"].mul_(-1.0)
    opt.state[weight]["YY"].zero_()
    train(opt, case.model, case.batches[6:12], case.loss)
    assert count(opt, weight, "H_g restarted") == 1
    H = opt.preconditioner()["2"].left @ torch.eye(len(weight))
    assert is_positive_definite(0.5 * (H + H.mT))


@pytest.mark.parametrize("factor", ["H_g", "H_a"])
def test_a_factor_that_breaks_again_and_again_stops_training(factor, monkeypatch):
    case, opt, weight = trained("mlp", 4)
    name = {"H_g": "start_h_g", "H_a": "start_h_a"}[factor]
    original = getattr(restarts, name)

    def spoil(*args):
        original(*args)
        opt.state[weight][factor].fill_(torch.nan)

    monkeypatch.setattr(restarts, name, spoil)
    opt.state[weight][factor].fill_(torch.nan)
    train(opt, case.model, case.batches[4 : 4 + PATIENCE], case.loss)
    with pytest.raises(NumericalError, match=f"layer '2': {factor} .* {PATIENCE} times in a row"):
        train(opt, case.model, case.batches[:1], case.loss)


def test_what_was_noted_travels_in_the_state():
    (case, opt, weight), (twin, other, _) = trained("cnn", 4), trained("cnn", 4)
    opt.state[weight]["H_g"].mul_(-1.0)
    train(opt, case.model, case.batches[4:5], case.loss)
    twin.model.load_state_dict(case.model.state_dict())
    other.load_state_dict(opt.state_dict())
    for own, optimizer in ((case, opt), (twin, other)):
        train(optimizer, own.model, case.batches[5:8], case.loss)
    for p, q in zip(case.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_pair_of_zeros_breaks_nothing():
    """A dead layer: its gradients do not change, yᵀH_g y = 0."""
    case, opt, weight = trained("mlp", 3)
    with torch.no_grad():
        case.model.get_submodule("4").weight.zero_()
    for group in opt.param_groups:
        group["lr"] = 0.0
    train(opt, case.model, case.batches[3:8], case.loss)
    assert count(opt, weight, "H_g restarted") == 0


def test_one_of_two_groups_alone_is_counted_but_its_layer_begins_anew():
    case, opt, weight = trained("cnn", 4)
    opt.state[weight]["H_g"][1].mul_(-1.0)
    train(opt, case.model, case.batches[4:6], case.loss)
    assert opt.state[weight]["restarts"].sum() == 0
    assert count(opt, weight, "H_g restarted") == 2


def test_a_convolution_waits_for_inputs_that_are_finite():
    case, opt, weight = trained("cnn", 4)
    opt.state[weight]["H_a"].mul_(-1.0)
    train(opt, case.model, case.batches[4:5], case.loss)
    x, t = case.batches[5]
    bad = x.clone()
    bad[0, 0, 0, 0] = torch.nan
    train(opt, case.model, [(bad, t)], case.loss)
    assert count(opt, weight, "H_a restarted") == 0
    train(opt, case.model, case.batches[6:7], case.loss)
    assert count(opt, weight, "H_a restarted") == 2
    assert is_positive_definite(opt.state[weight]["H_a"])
