"""What CurvatureOptimizer does for all methods: settings and states of earlier versions."""

import copy

import pytest
import torch

from kronscope import optim
from tests.optim.cases import MAKE, ONE_EACH, RECIPES, make_for, train_on, weights
from tests.optim.models import CASES

FORMER = [
    (kind, name)
    for kind in sorted(ONE_EACH)
    for name in getattr(optim, RECIPES[kind].method)._former
]


def trained(kind):
    case = CASES["mlp"]()
    opt = make_for(kind, case)
    train_on(opt, case, case.batches[:3])
    return case, opt


def earlier(opt):
    """Its state as an earlier version would have written it, with the settings that are gone."""
    state = copy.deepcopy(opt.state_dict())
    for group in state["param_groups"]:
        group |= {name: usual for name, (usual, _) in opt._former.items()}
    return state


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in FORMER}))
def test_states_of_earlier_versions_resume(kind):
    case, opt = trained(kind)
    twin = case._replace(model=copy.deepcopy(case.model))
    other = make_for(kind, twin)
    other.load_state_dict(earlier(opt))
    assert not other._former.keys() & other.param_groups[0].keys()
    train_on(opt, case, case.batches[3:6])
    train_on(other, twin, case.batches[3:6])
    assert torch.equal(weights(case.model), weights(twin.model))


@pytest.mark.parametrize(("kind", "name"), FORMER)
def test_settings_that_are_gone_are_refused_by_name(kind, name):
    case, opt = trained(kind)
    method = type(opt).__name__
    with pytest.raises(TypeError, match=f"{method} takes no {name}=; "):
        MAKE[kind](case.model, **{name: 1})
    state, before = earlier(opt), weights(case.model)
    state["param_groups"][0][name] = "another"
    with pytest.raises(ValueError, match=f"the state is of {method}\\({name}='another'\\); "):
        opt.load_state_dict(state)
    assert torch.equal(weights(case.model), before)


@pytest.mark.parametrize("kind", sorted(ONE_EACH))
def test_the_state_of_another_optimizer_is_refused(kind):
    case, opt = trained(kind)
    sgd = torch.optim.SGD(case.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"the state is of another optimizer than .*'damping'"):
        opt.load_state_dict(sgd.state_dict())
