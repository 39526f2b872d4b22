"""The masked path of a GPU gives the fast path's numbers; summary() tells all; GPUs never wait."""

import re
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kronscope.optim.linalg.basics import known_true
from tests.optim.cases import MAKE, each, make_for, state_of, train_on, weights
from tests.optim.models import CASES

every = pytest.mark.parametrize("kind", each(MAKE))
SETTINGS = {"update_every": 2, "refresh_every": 2, "weight_decay": 0.01}


def patch_everywhere(monkeypatch, name, function):
    """Replace a function in every module of optim that has imported it; how many there were."""
    found = [
        m for key, m in sys.modules.items() if key.startswith("kronscope.optim") and name in vars(m)
    ]
    for module in found:
        monkeypatch.setattr(module, name, function)
    return len(found)


@every
@pytest.mark.parametrize(
    ("case_name", "decoupled"), [("mlp", True), ("cnn", False), ("shared", False)]
)
def test_the_masked_path_equals_the_fast_one(kind, case_name, decoupled, monkeypatch):
    results = []
    for masked in (False, True):
        if masked:
            # on a GPU nothing can be known for nothing
            assert patch_everywhere(monkeypatch, "known_true", lambda _: False) >= 4
        case = CASES[case_name]()
        opt = make_for(kind, case, decoupled_weight_decay=decoupled, **SETTINGS)
        losses = train_on(opt, case, case.batches[:6])
        results.append((torch.tensor(losses), weights(case.model), state_of(opt)))
    (fast_losses, fast, held), (losses, masked_weights, masked_held) = results
    # the same arithmetic in another order
    torch.testing.assert_close(fast_losses, losses, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(fast, masked_weights, rtol=1e-9, atol=1e-11)
    for a, b in zip(held, masked_held, strict=True):
        assert a.keys() == b.keys()
        # eigenvectors of values close together turn with the rounding, and EKFAC's S with them
        turning = {"U_A", "U_G", "S"} if "U_A" in a else set()
        for key in a.keys() - turning:
            torch.testing.assert_close(a[key], b[key], rtol=1e-7, atol=1e-9, msg=key)


def bytes_of(said):
    """'1.2 kB' in bytes."""
    number, unit = said.split()
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6}[unit]


@every
@pytest.mark.parametrize("case_name", ["cnn", "shared"])
def test_summary_adds_up(kind, case_name):
    case = CASES[case_name]()
    norm = torch.nn.Parameter(torch.ones(3))
    case.model.register_parameter("extra", norm)
    loss = case.loss
    case = case._replace(loss=lambda model, batch: loss(model, batch) + norm.square().sum())
    opt = make_for(kind, case)
    train_on(opt, case, case.batches[:3])
    head, _, *rows, last = opt.summary().splitlines()
    assert head.startswith(f"{type(opt).__name__} after 3 steps, ")
    memory = re.compile(r"\d+(?:\.\d+)? [kM]?B\b")
    named = dict(case.model.named_parameters())
    assert [row.split()[0] for row in rows] == list(named)
    said = {row.split()[0]: bytes_of(memory.search(row).group()) for row in rows}
    total = 0
    for name, parameter in named.items():
        tensors = [v for v in opt.state.get(parameter, {}).values() if torch.is_tensor(v)]
        own = sum(v.numel() * v.element_size() for v in tensors)
        total += own
        assert said[name] == pytest.approx(own, abs=0 if own < 1000 else 50)  # one decimal of kB
    assert bytes_of(memory.search(last).group()) == pytest.approx(total, rel=0.06)
    held = {
        id(v): v.numel() * v.element_size()
        for stack in opt._harness.stacks
        for v in stack.tensors.values()
    }
    plain = [p for p in named.values() if p not in {b.weight for b in opt._harness.blocks}]
    beside = sum(v.numel() * v.element_size() for p in plain for v in opt.state.get(p, {}).values())
    # nothing is held beside what the state shows
    assert sum(held.values()) + beside == total
    treated = next(row for row in rows if row.startswith("extra"))
    assert "plain rule" in treated or "axes" in treated


def on_gpu(case_name):
    """A case in float32 on the GPU."""
    case = CASES[case_name]()
    case.model.to("cuda", torch.float32)
    batches = [
        tuple(v.cuda().float() if v.is_floating_point() else v.cuda() for v in batch)
        for batch in case.batches
    ]
    return case._replace(batches=batches)


def quiet_steps(opt, case, data):
    """Steps during which nothing may wait for the device; the losses stay on it."""
    losses = []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in data:

            def closure(batch=batch):
                opt.zero_grad()
                loss = case.loss(case.model, batch)
                loss.backward()
                return loss.detach()

            losses.append(opt.step(closure))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return torch.stack(losses).cpu()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@every
@pytest.mark.parametrize("case_name", sorted(CASES))
def test_no_step_waits_for_the_gpu(kind, case_name):
    """Steps 4 to 7: two with updates, one with refreshes, for which EKFAC's eigh must wait."""
    case = on_gpu(case_name)
    opt = make_for(kind, case, update_every=2, refresh_every=3, weight_decay=0.01)
    train_on(opt, case, case.batches[:4])  # masks are made, libraries start
    losses = quiet_steps(opt, case, case.batches[4 : 6 if kind.startswith("ekfac") else 8])
    assert torch.isfinite(losses).all()
    assert torch.isfinite(weights(case.model)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@every
@pytest.mark.parametrize("case_name", sorted(CASES))
def test_the_gpu_follows_the_cpu(kind, case_name):
    results = []
    for device in ("cpu", "cuda"):
        case = CASES[case_name]()
        case.model.to(device)
        data = [tuple(v.to(device) for v in batch) for batch in case.batches[:6]]
        opt = make_for(kind, case, refresh_every=2, weight_decay=0.01)
        if opt._harness.capture.sample is not None:
            opt._harness.capture.sample = lambda output: torch.sin(5 * output)
        losses = train_on(opt, case, data)
        results.append((torch.tensor(losses), weights(case.model).cpu()))
    (on_cpu, one), (on_cuda, other) = results
    # float64 on both: products in another order
    torch.testing.assert_close(on_cpu, on_cuda, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


class NotYet:
    """An event that a busy GPU has not come to."""

    def query(self):
        return False


def hollow_out(model):
    """Parameters and buffers without values, those that are tied still so."""
    found = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor not in found:
                    found[tensor] = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, torch.nn.Parameter):
                        found[tensor] = torch.nn.Parameter(found[tensor])
                held[name] = found.get(tensor)


@every
@pytest.mark.parametrize("case_name", ["cnn", pytest.param("shared", marks=pytest.mark.slow)])
def test_no_step_needs_a_value_in_python(kind, case_name, monkeypatch):
    """Steps 4 to 6 on a GPU's path, with tensors that have no values: to look at one raises."""
    case, hollow = CASES[case_name](), CASES[case_name]()
    settings = {"update_every": 2, "refresh_every": 3, "weight_decay": 0.01}
    opt = make_for(kind, case, **settings)
    train_on(opt, case, case.batches[:4])
    assert patch_everywhere(monkeypatch, "free_to_read", lambda _: False) >= 3
    assert patch_everywhere(monkeypatch, "to_host", lambda flags: (flags, NotYet())) >= 1
    with FakeTensorMode(allow_non_fake_inputs=True):
        hollow_out(hollow.model)
        twin = make_for(kind, hollow, **settings)
        twin.load_state_dict({k: v for k, v in opt.state_dict().items() if k != "labels"})
        if twin._harness.capture.sample is not None:  # exponential_ is not made for such tensors
            twin._harness.capture.sample = lambda output: torch.sin(5 * output)
        for batch in case.batches[4:7]:
            values = tuple(torch.empty(v.shape, dtype=v.dtype) for v in batch)

            def closure(values=values):
                twin.zero_grad()
                loss = hollow.loss(hollow.model, values)
                loss.backward()
                return loss.detach()

            twin.step(closure)
    assert twin.param_groups[0]["step"] == 7


def test_a_value_that_is_needed_is_noticed():
    """The test above can fail: where values are free to read, as on a CPU, they are."""
    with FakeTensorMode(), pytest.raises(RuntimeError, match="_local_scalar_dense"):
        known_true(torch.ones(2, dtype=torch.bool))


def test_memory_of_kbfgs():
    """Beyond the momentum 2 (in+1)² + out² numbers a layer, and a few vectors."""
    case = CASES["mlp"]()
    opt = MAKE["kbfgs"](case.model)
    train_on(opt, case, case.batches[:1])
    for module in case.model:
        if isinstance(module, torch.nn.Linear):
            (out, size), state = module.weight.shape, opt.state[module.weight]
            held = sum(value.numel() for name, value in state.items() if name != "momentum")
            assert held <= 2 * (size + 1) ** 2 + out**2 + 2 * out + 14  # s, y, counters
