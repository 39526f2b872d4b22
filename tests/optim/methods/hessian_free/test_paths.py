"""The path of a GPU, where Python sees no values, leads HessianFree where the fast one does."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.optim.cases import weights
from tests.optim.methods.hessian_free.cases import (
    as_on_a_gpu,
    counts,
    every,
    make_for,
    solutions,
    step,
)
from tests.optim.models import CASES


@every
@pytest.mark.parametrize(("name", "decoupled"), [("mlp", True), ("cnn", False), ("shared", False)])
def test_the_masked_path_equals_the_fast_one(name, method, blocks, decoupled, monkeypatch):
    """A failed step and a block whose stale start fails among the others."""
    ends = []
    for masked in (False, True):
        torch.manual_seed(0)
        if masked:
            assert as_on_a_gpu(monkeypatch) >= 5
        case = CASES[name]()
        opt = make_for(
            case, blocks, weight_decay=0.01, decoupled_weight_decay=decoupled, method=method
        )
        for i, (x, t) in enumerate(case.batches[:7]):
            opt.param_groups[0]["max_cg"] = 1 if i == 4 else 4
            if i == 4:
                opt.state[opt.parts[-1].parameters[0]]["solution"].fill_(1e6)
            step(opt, case, (x * float("nan") if i == 2 else x, t))
        ends.append((weights(case.model), counts(opt), solutions(opt), getattr(opt, "factor", 1.0)))
    (fast, known, d, factor), (slow, noted, other, same) = ends
    assert known == noted
    assert known["skipped"][opt.parts[0].name] == 2
    assert float(factor) == float(same)
    # the same arithmetic in another order
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    for block in d:
        torch.testing.assert_close(d[block], other[block], rtol=1e-9, atol=1e-12)


class NotYet:
    """An event that a busy GPU has not come to."""

    def query(self):
        return False


def hollow_out(model):
    """Parameters without values."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype))


@pytest.mark.parametrize(("name", "blocks"), [("cnn", None), ("shared", [])])
def test_no_step_needs_a_value_in_python(name, blocks, monkeypatch):
    """On a GPU's path, with tensors that have no values: to look at one raises."""
    case, hollow = CASES[name](), CASES[name]()
    settings = {"curvature_batch": 8}
    opt = make_for(case, blocks, weight_decay=0.01, **settings)
    for batch in case.batches[:2]:
        step(opt, case, batch)
    assert as_on_a_gpu(monkeypatch, NotYet) >= 5
    with FakeTensorMode(allow_non_fake_inputs=True):
        hollow_out(hollow.model)
        twin = make_for(hollow, blocks, weight_decay=0.01, **settings)
        twin.load_state_dict(opt.state_dict())
        with pytest.raises(RuntimeError, match=r"_local_scalar_dense|data.dependent"):
            hollow_step(twin, hollow, case.batches[2])  # to try routes is to look
        twin.route = opt.route
        for batch in case.batches[3:5]:
            hollow_step(twin, hollow, batch)
    assert twin.param_groups[0]["step"] == 4


def hollow_step(opt, case, batch):
    values = tuple(torch.empty(v.shape, dtype=v.dtype) for v in batch)

    def closure():
        opt.zero_grad()
        loss = case.loss(case.model, values)
        loss.backward()
        return loss.detach()

    opt.step(closure)
