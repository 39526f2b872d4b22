"""Peephole LSTM against nn.LSTM, by hand and twice differentiated; the sequences it reads."""

import math

import numpy as np
import pytest
import sklearn.datasets
import torch
from torch import nn

from kronscope.studies import data
from kronscope.studies.problems import _lstm as recurrent
from kronscope.studies.problems._lstm import PeepholeLSTM, SequenceClassifier

SIZES = {"one layer": (3, 4, 1), "three layers": (2, 5, 3)}
H = 1e-6  # of central differences: their error is near 1e-10 in float64


def with_peepholes(*sizes):
    """An LSTM all of whose parameters, peepholes too, are drawn."""
    lstm = PeepholeLSTM(*sizes)
    for parameter in lstm.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return lstm


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "initial state"])
def test_without_peepholes_it_is_an_lstm(sizes, given):
    ours, theirs = PeepholeLSTM(*sizes), nn.LSTM(*sizes, batch_first=True)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert len(missing) == 3 * sizes[2]
    assert all(name.startswith(recurrent.PEEPHOLES) for name in missing)
    assert not unexpected
    x = torch.randn(6, 7, sizes[0])
    state = torch.randn(2, sizes[2], 6, sizes[1]).unbind(0) if given else None
    found, expected = ours(x, state), theirs(x, state)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-12)  # float64
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-12)
    single = ours.float()(x.float()), theirs.float()(x.float())
    torch.testing.assert_close(single[0][0], single[1][0], rtol=0, atol=1e-6)


def test_a_new_one_is_the_lstm_of_the_same_seed():
    torch.manual_seed(3)
    expected = nn.LSTM(2, 5, 2).state_dict()
    torch.manual_seed(3)
    found = PeepholeLSTM(2, 5, 2).state_dict()
    assert len(found) == len(expected) + 6
    for name, value in found.items():
        assert torch.equal(value, expected.get(name, torch.zeros(5))), name


def test_one_step_by_hand():
    """One unit, weights on the input 0.5, on the hidden state 1, biases 0.1; h = 0.2, c = 0.4."""
    lstm = PeepholeLSTM(1, 1)
    values = {"weight_ih": 0.5, "weight_hh": 1.0, "bias_ih": 0.1, "bias_hh": 0.0}
    values |= {"weight_ci": 0.3, "weight_cf": -0.7, "weight_co": 2.0}
    for name, value in values.items():
        nn.init.constant_(getattr(lstm, f"{name}_l0"), value)
    h, c = torch.tensor([[[0.2]]]), torch.tensor([[[0.4]]])
    output, (h_n, c_n) = lstm(torch.tensor([[[2.0]]]), (h, c))

    def sigmoid(z):
        return 1 / (1 + math.exp(-z))

    gate = 0.5 * 2 + 0.1 + 1.0 * 0.2  # 1.3 of every gate
    cell = sigmoid(gate - 0.7 * 0.4) * 0.4 + sigmoid(gate + 0.3 * 0.4) * math.tanh(gate)
    hidden = sigmoid(gate + 2.0 * cell) * math.tanh(cell)
    assert c_n.item() == pytest.approx(cell, rel=1e-14)
    assert h_n.item() == output.item() == pytest.approx(hidden, rel=1e-14)


@pytest.mark.parametrize("name", recurrent.PEEPHOLES)
def test_each_peephole_matters(name):
    """Its gradient is that of differences, and not zero, in both layers, from the start."""
    lstm, x = PeepholeLSTM(2, 3, 2), torch.randn(4, 5, 2)
    lstm(x)[0].square().sum().backward()
    for k in range(2):
        weight = getattr(lstm, f"{name}_l{k}")
        assert weight.grad.abs().min() > 1e-6
        differences = torch.zeros(3)
        for i in range(3):
            for sign in (1, -1):
                with torch.no_grad():
                    weight[i] += sign * H
                    differences[i] += sign * lstm(x)[0].square().sum() / (2 * H)
                    weight[i] -= sign * H
        torch.testing.assert_close(weight.grad, differences, rtol=1e-5, atol=1e-8)


def functional(lstm):
    """Names, values and the outputs as a function of (x, h_0, c_0, *values)."""
    names, values = zip(*lstm.named_parameters(), strict=True)

    def outputs(x, h, c, *values):
        named = dict(zip(names, values, strict=True))
        output, (h_n, c_n) = torch.func.functional_call(lstm, named, (x, (h, c)))
        return output, h_n, c_n

    return outputs, tuple(value.detach() for value in values)


def test_differentiates_twice():
    outputs, values = functional(with_peepholes(1, 2, 2))
    points = (torch.randn(2, 2, 1), torch.randn(2, 2, 2), torch.randn(2, 2, 2), *values)
    points = tuple(point.requires_grad_() for point in points)
    assert torch.autograd.gradcheck(outputs, points, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(outputs, points)


# torch.func.linearize folds constants in a way that torch's own graphs warn of, for any network
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
def test_differentiates_forwards():
    outputs, values = functional(with_peepholes(2, 3, 2))
    points = (torch.randn(4, 5, 2), torch.randn(2, 4, 3), torch.randn(2, 4, 3), *values)
    tangents = tuple(torch.randn_like(point) for point in points)
    found, forward = torch.func.jvp(outputs, points, tangents)
    torch.testing.assert_close(found, outputs(*points))
    above, below = (
        outputs(*(p + sign * H * t for p, t in zip(points, tangents, strict=True)))
        for sign in (1, -1)
    )
    differences = tuple((a - b) / (2 * H) for a, b in zip(above, below, strict=True))
    torch.testing.assert_close(forward, differences, rtol=1e-6, atol=1e-7)
    value, linear = torch.func.linearize(outputs, *points)
    torch.testing.assert_close(value, found)
    torch.testing.assert_close(linear(*tangents), forward)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_differentiates_twice_on_a_gpu():
    outputs, values = functional(with_peepholes(1, 2, 2).cuda())
    points = (torch.randn(2, 2, 1), torch.randn(2, 2, 2), torch.randn(2, 2, 2), *values)
    points = tuple(point.cuda().requires_grad_() for point in points)
    assert torch.autograd.gradgradcheck(outputs, points)


def test_refusals():
    with pytest.raises(ValueError, match="sizes are at least one, not 1, 0, num_layers=2"):
        PeepholeLSTM(1, 0, 2)
    lstm = PeepholeLSTM(2, 3)
    for shape in ((5, 2), (4, 5, 3), (4, 0, 2)):
        with pytest.raises(ValueError, match=r"are \[n, T, 2\] with T > 0, not \["):
            lstm(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"are \[1, 4, 3\], not \[1, 1, 3\] and \[1, 4, 3\]"):
        lstm(torch.zeros(4, 5, 2), (torch.zeros(1, 1, 3), torch.zeros(1, 4, 3)))


def test_the_classifier():
    model = SequenceClassifier(inputs=1, hidden=10, layers=3, classes=7)
    assert [name for name, _ in model.named_children()] == ["lstm1", "lstm2", "lstm3", "head"]
    x = torch.randn(4, 6, 1)
    stacked = PeepholeLSTM(1, 10, 3)
    own = {name.replace("_l0", ""): value for name, value in model.state_dict().items()}
    for name in stacked.state_dict():
        kind, k = name.rsplit("_l", 1)
        getattr(stacked, name).data = own[f"lstm{int(k) + 1}.{kind}"]
    _, (h_n, _) = stacked(x)
    torch.testing.assert_close(model(x), model.head(h_n[-1]))


def test_pooled_sequences_by_hand():
    pictures = np.arange(2 * 4 * 4).reshape(2, 4, 4)
    found = data.pooled_sequences(pictures, np.array([3, 1]), size=2, train=1)
    # of 0 1 4 5, of 2 3 6 7, ...; the second picture is 16 higher
    assert found.train_inputs.tolist() == [[[2.5], [4.5], [10.5], [12.5]]]
    assert found.test_inputs.tolist() == [[[18.5], [20.5], [26.5], [28.5]]]
    assert (found.train_targets.tolist(), found.test_targets.tolist()) == ([3], [1])
    assert found.train_inputs.dtype == torch.float32
    assert found.train_targets.dtype == torch.int64
    with pytest.raises(ValueError, match="patches of 3 x 3 do not fill pictures of 4 x 4"):
        data.pooled_sequences(pictures, np.array([3, 1]), size=3, train=1)


def test_digits_sequences_are_the_digits():
    found, whole = data.digits_sequences(), data.digits()
    assert found.train_inputs.shape == (1500, 16, 1)
    assert found.test_targets.shape == (297,)
    first = whole.train_inputs[0].reshape(8, 8)
    patches = [
        first[2 * a : 2 * a + 2, 2 * b : 2 * b + 2].mean() for a in range(4) for b in range(4)
    ]
    torch.testing.assert_close(found.train_inputs[0, :, 0], torch.stack(patches))
    counts = torch.cat([found.train_targets, found.test_targets]).bincount()
    assert counts.tolist() == np.bincount(sklearn.datasets.load_digits().target).tolist()
