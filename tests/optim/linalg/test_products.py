"""Products of matrices: by either library of PyTorch's, against float64; which library is taken."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kronscope.optim.capture import closures as passes
from kronscope.optim.linalg import products
from tests.optim.cases import MAKE, takes, train

MATMUL, CONV = products.CPU.matmul, products.CPU.conv
sides = st.integers(1, 300)
with products.allowed(MATMUL, "bf16"):
    IN_FLOAT32 = products.keeps_float32(torch.mm)
onednn_in_float32 = pytest.mark.skipif(not IN_FLOAT32, reason="bfloat16 is used on this processor")
either = pytest.mark.parametrize("faster", [False, True], ids=["usual", "onednn"])
by_both = pytest.mark.parametrize("faster", [False, pytest.param(True, marks=onednn_in_float32)])


@pytest.fixture
def library(monkeypatch):
    """As if oneDNN were the faster library here, or were not."""
    return lambda faster: monkeypatch.setattr(products, "onednn_is_faster", lambda: faster)


def wide(*shape):
    return torch.randn(*shape, dtype=torch.float32)


def close_to(found, exact):
    """To the rounding of sums of up to 300 terms in float32."""
    norm = torch.linalg.vector_norm
    return bool(norm(found.double() - exact) <= 2e-6 * norm(exact))


@by_both
@given(stack=st.integers(1, 3), m=sides, k=sides, n=sides, turned=st.booleans())
def test_products_are_exact_to_float32(faster, stack, m, k, n, turned):
    torch.manual_seed(m + k + n)
    A, B = wide(stack, k, m).mT if turned else wide(stack, m, k), wide(stack, k, n + 3)[..., :n]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "onednn_is_faster", lambda: faster)
        assert close_to(products.product(A, B), A.double() @ B.double())


@by_both
@given(groups=st.integers(1, 2), rows=st.integers(1, 200), n=sides, beta=st.sampled_from([0, 0.9]))
def test_symmetric_products_are_exact_to_float32(faster, groups, rows, n, beta):
    torch.manual_seed(rows + n)
    a, out = wide(groups, rows, n), wide(groups, n + 1, n + 1)
    out, border = out + out.mT, (out + out.mT)[:, n].clone()
    exact = beta * out[:, :n, :n].double() + 0.3 * a.double().mT @ a.double()
    if not beta:
        out[:, :n, :n] = torch.nan  # must not be read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "onednn_is_faster", lambda: faster)
        products.gram_(out[:, :n, :n], a, beta=beta, alpha=0.3)
    assert close_to(out[:, :n, :n], exact)
    assert torch.equal(out[:, n], border)


@pytest.fixture
def settings_seen(monkeypatch):
    """What PyTorch may use in products when one is made."""
    seen, bmm = [], torch.bmm

    def spy(A, B):
        seen.append(MATMUL.fp32_precision)
        return bmm(A, B)

    monkeypatch.setattr(torch, "bmm", spy)
    return seen


@either
def test_the_library_is_changed_for_large_float32_products_alone(faster, library, settings_seen):
    library(faster)
    before = MATMUL.fp32_precision
    large, small = wide(1, 128, 128), wide(1, 127, 127)
    for A in (large, small, large.double()):
        products.product(A, A)
        assert MATMUL.fp32_precision == before
    assert settings_seen == ["bf16" if faster else before, before, before]


def test_the_setting_comes_back_after_an_error(library):
    library(True)
    before = MATMUL.fp32_precision
    with pytest.raises(RuntimeError, match="size"):
        products.product(wide(1, 300, 300), wide(1, 200, 300))
    assert MATMUL.fp32_precision == before


ZEN, OTHERS = (
    {"avx512_f": True, "cpu_name": "AMD EPYC"},
    [
        {},
        {"avx512_f": False, "avx2": True, "cpu_name": "AMD EPYC"},
        {"avx512_f": True, "cpu_name": "Intel Xeon Platinum 8480+"},
    ],
)


def chosen(monkeypatch, capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    return products.onednn_is_faster.__wrapped__()


def test_which_processors_it_is_faster_on(monkeypatch):
    def kept(_):
        assert not torch.is_autocast_enabled("cpu")  # the user's would be no judgement on oneDNN
        assert MATMUL.fp32_precision == "bf16"
        return True

    monkeypatch.setattr(products, "keeps_float32", kept)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert chosen(monkeypatch, ZEN)
        assert not any(chosen(monkeypatch, each) for each in OTHERS)


def test_a_library_that_does_not_keep_float32_is_not_taken(monkeypatch):
    exact = torch.mm
    monkeypatch.setattr(torch, "mm", lambda A, B: exact(A.bfloat16(), B.bfloat16()).float())
    assert not chosen(monkeypatch, ZEN)


def test_the_trial_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    assert products.keeps_float32(torch.mm)
    assert torch.equal(torch.get_rng_state(), before)


def test_full_precision_forbids_bfloat16_on_a_cpu():
    inside = []
    with products.allowed(MATMUL, "bf16"), products.allowed(CONV, "bf16"):
        with passes.full_precision(torch.device("cpu")):
            inside = [MATMUL.fp32_precision, CONV.fp32_precision]
        assert [MATMUL.fp32_precision, CONV.fp32_precision] == ["bf16", "bf16"]
    assert inside == ["ieee", "ieee"]


def network():
    """Layers wide enough for large products, in float32; their weights and biases."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(150, 200), nn.Tanh(), nn.Linear(200, 150)).float()
    return model, torch.cat([p.detach().flatten() for p in model.parameters()])


def binary(count):
    """Batches of 160 pictures of zeros and ones."""
    return [(wide(160, 150) > 0).float() for _ in range(count)]


def trained(kind):
    """Losses of three steps, and the way of the parameters."""
    model, start = network()
    opt = MAKE[kind](model)
    losses = train(opt, model, binary(3))
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()]) - start


# Eva has no large product; mini-blocks of every neuron are too many for a test
LARGE = sorted(set(MAKE) - {"eva"})


@onednn_in_float32
@pytest.mark.parametrize("kind", LARGE)
def test_optimizers_do_the_same_by_either_library(kind, library, monkeypatch):
    library(False)
    losses, way = trained(kind)
    library(True)
    used, allowed = [], products.allowed
    monkeypatch.setattr(products, "allowed", lambda *args: used.append(args) or allowed(*args))
    others, other_way = trained(kind)
    assert used
    assert others == pytest.approx(losses, rel=1e-4)
    norm = torch.linalg.vector_norm
    assert norm(other_way - way) < 1e-2 * norm(way)  # damped inverses magnify rounding


@onednn_in_float32
@pytest.mark.parametrize("kind", LARGE)
def test_resume_is_bit_exact_by_the_faster_library(kind, library):
    """In other memory than before: sums are made in the same order."""
    library(True)
    model, _ = network()
    settings = {"refresh_every": 2} if takes(kind, "refresh_every") else {}
    opt, data = MAKE[kind](model, **settings), binary(5)
    train(opt, model, data[:2])
    other, _ = network()
    again = MAKE[kind](other, **settings)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for each, net in ((opt, model), (again, other)):
        train(each, net, data[2:])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
