"""K-BFGS's split of the damping: convolutions of one stack have each its number of places."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kronscope import optim


@pytest.mark.parametrize("warm", [False, True])
def test_each_convolution_of_a_stack_has_its_own_number_of_positions(warm):
    """Two of one shape at 16 and 4 places, in one stack, against those written out."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1), nn.AvgPool2d(2), nn.Conv2d(2, 2, 3, padding=1)
    )
    opt = optim.KBFGS(model, lr=0.0, damping=0.09, damping_split="sqrtT", decay=0.0)
    x = torch.randn(20, 2, 4, 4)

    def closure():
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    if warm:
        opt.warm_up([closure])
    else:
        opt.step(closure)  # at lr = 0 the pair is none, and H_a learns from its own action
    inputs = {"0": x, "2": model[:2](x).detach()}
    for name, T in (("0", 16), ("2", 4)):
        a = F.unfold(inputs[name], 3, padding=1).mT.reshape(-1, 18)
        a = torch.cat([a, torch.ones(len(a), 1)], 1)
        damped = a.mT @ a / 20 + 0.3 * T**0.5 * torch.eye(19)
        H_a = opt.state[model.get_submodule(name).weight]["H_a"]
        torch.testing.assert_close(H_a.to(damped), torch.linalg.inv(damped), rtol=1e-4, atol=1e-5)
    assert len(opt._harness.stacks) == 1
