"""LayerwiseStep on convolutions and shared weights, around KFAC, in mixed precision."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, hessian

from kronscope.optim import KFAC
from kronscope.optim.methods.layerwise.layerwise_step import LayerwiseStep
from tests.optim.cases import closure_of, train_on
from tests.optim.models import CASES

FREE = 1e9  # a bound that never binds


def layer_blocks(case, batch):
    """{layer: (g_l, H_ll)} of the layer's own parameters, dense."""
    found = {}
    for name, module in case.model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        flat = torch.cat([p.detach().reshape(-1) for p in own.values()])

        def loss(flat, own=own, name=name):
            pieces = flat.split([p.numel() for p in own.values()])
            values = {
                f"{name}.{key}": piece.reshape(p.shape)
                for (key, p), piece in zip(own.items(), pieces, strict=True)
            }
            return case.loss(lambda x: functional_call(case.model, values, (x,)), batch)

        found[name] = torch.func.grad(loss)(flat), hessian(loss)(flat)
    return found


@pytest.mark.parametrize("name", sorted(CASES))
def test_alpha_is_that_of_the_dense_block(name):
    case = CASES[name]()
    blocks = layer_blocks(case, case.batches[0])
    sgd = torch.optim.SGD(case.model.parameters(), 0.1)
    opt = LayerwiseStep(sgd, case.model, max_step=FREE, max_move=FREE)
    train_on(opt, case, case.batches[:1])
    found = opt.step_sizes()
    assert found.keys() == blocks.keys()
    for layer, (g, H) in blocks.items():
        torch.testing.assert_close(found[layer], (g @ g) / (g @ H @ g).abs())


@pytest.mark.parametrize("name", sorted(CASES))
def test_around_kfac_training_goes_down(name):
    case = CASES[name](count=24)
    inner = KFAC(case.model, 0.1, damping=0.3, refresh_every=2, likelihood=case.likelihood)
    opt = LayerwiseStep(inner, case.model)
    losses = train_on(opt, case, case.batches[:1] * 20)
    assert losses[-1] < 0.9 * losses[0]


def test_autocast():
    case = CASES["cnn"]()
    case.model.float()
    opt = LayerwiseStep(torch.optim.SGD(case.model.parameters(), 0.1, momentum=0.9), case.model)

    def loss(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(batch[0])
        assert output.dtype == torch.bfloat16
        return torch.nn.functional.cross_entropy(output.float(), batch[1])

    batch = case.batches[0][0].float(), case.batches[0][1]
    losses = [opt.step(closure_of(opt, case.model, batch, loss)).item() for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    assert {alpha.dtype for alpha in opt.step_sizes().values()} == {torch.float32}


def test_a_grad_scaler_is_refused():
    case = CASES["mlp"]()
    opt = LayerwiseStep(torch.optim.SGD(case.model.parameters(), 0.1), case.model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in case.model.parameters()]
    scaler.scale(case.loss(case.model, case.batches[0])).backward()
    with pytest.raises(ValueError, match=r"LayerwiseStep.*GradScaler"):
        scaler.step(opt)
    for p, old in zip(case.model.parameters(), before, strict=True):
        assert torch.equal(p, old)


def hollow_out(model):
    """Parameters without values in place of those of a model."""
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                module._parameters[key] = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype))


@pytest.mark.parametrize("name", ["shared"])
def test_no_step_needs_a_value_in_python(name):
    """With tensors that have no values, to look at one raises: on a GPU Python would wait."""
    case = CASES[name]()
    with FakeTensorMode(allow_non_fake_inputs=True):
        hollow_out(case.model)
        sgd = torch.optim.SGD(case.model.parameters(), 0.1, momentum=0.9)
        opt = LayerwiseStep(sgd, case.model)
        for x, t in case.batches[:4]:
            values = torch.empty(x.shape, dtype=x.dtype), torch.empty(t.shape, dtype=t.dtype)
            opt.step(closure_of(opt, case.model, values, case.loss))
    assert len(opt.step_sizes()) == 4  # layers
