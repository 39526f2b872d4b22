"""K-BFGS follows the authors' own trajectory."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kronscope.optim import KBFGS
from tests.paths import REFERENCE

RUN = json.loads((REFERENCE / "kbfgs_tiny.json").read_text())
X = torch.tensor(RUN["X"], dtype=torch.float64)
BATCHES = [X[i : i + RUN["batch"]] for i in range(0, RUN["N"], RUN["batch"])]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def network():
    layers = []
    for activation, (W, b) in zip(RUN["activations"], RUN["init"], strict=True):
        linear = nn.Linear(len(W[0]), len(W))
        linear.load_state_dict({"weight": tensor(W), "bias": tensor(b)})
        layers += [linear, nn.ReLU(inplace=True)] if activation == "relu" else [linear]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("history", [None, 24])
def test_trajectory(history):
    model = network()
    opt = KBFGS(model, lr=0.3, damping=0.3, weight_decay=RUN["weight_decay"], history=history)
    linears = [m for m in model if isinstance(m, nn.Linear)]
    opt.warm_up([lambda x=x: model(x) for x in BATCHES])
    for linear, A in zip(linears, RUN["A0"], strict=True):
        torch.testing.assert_close(opt.state[linear.weight]["A"], tensor(A), rtol=1e-13, atol=1e-14)
    for k, entry in enumerate(RUN["trajectory"]):
        x = BATCHES[k % len(BATCHES)]

        def closure(x=x):
            opt.zero_grad()
            # float32 targets make the loss float32 too, as the recorded losses are. Inferred, not
            # documented: so the weights agree to 1.5e-14; a float64 loss ends 6e-8 away
            loss = F.binary_cross_entropy_with_logits(model(x), x.float(), reduction="sum") / len(x)
            loss.backward()
            return loss

        assert opt.step(closure).item() == pytest.approx(entry["loss"], rel=1e-6)  # float32
        for linear, (W, b) in zip(linears, entry["weights"], strict=True):
            # 24 steps of rounding: 1.5e-14 was seen, 1e-11 leaves room for other libraries
            assert (linear.weight - tensor(W)).norm() <= 1e-11 * tensor(W).norm()
            assert (linear.bias - tensor(b)).norm() <= 1e-11 * tensor(b).norm()
    for product, Ha, Hg in zip(opt.preconditioner().values(), RUN["Ha"], RUN["Hg"], strict=True):
        H_g = product.left @ torch.eye(product.left.shape[0])
        # each inverse is a product of 24 updates; one digit a decade of its condition number
        torch.testing.assert_close(product.right, tensor(Ha), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(H_g, tensor(Hg), rtol=1e-9, atol=1e-10)
