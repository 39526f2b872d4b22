"""The pieces of `kronscope bench step`, on a network of milliseconds."""

import dataclasses

import pytest
import torch
from torch import nn

from kronscope.studies import problems
from kronscope.studies.bench import step as bench_step
from kronscope.studies.problems.autoencoders import autoencoder
from kronscope.studies.training import optimizers

SMALL = dataclasses.replace(
    problems.get("mnist-autoencoder"), model=lambda: autoencoder((12, 7, 3, 7, 12), nn.ReLU)
)
PARAMETERS = 12 * 7 + 7 + 7 * 3 + 3 + 3 * 7 + 7 + 7 * 12 + 12


@pytest.fixture
def x():
    return torch.rand(16, 12, dtype=torch.float32)


@pytest.mark.parametrize("name", sorted(optimizers.OPTIMIZERS))
def test_every_optimizer_can_be_timed(name, x):
    cost = bench_step.measured(name, SMALL, x, x, rounds=1)
    assert cost.seconds > 0
    assert cost.ratio == cost.seconds / cost.yardstick
    assert cost.spike >= 1
    products = 2 * len(x) * (PARAMETERS - 29) * 3 - 2 * len(x) * 12 * 7  # none to the pixels
    assert cost.flops >= products
    assert cost.floats >= (0 if name == "sgd" else 0.9)


def test_products_and_memory_of_first_order_methods_are_known(x):
    sgd, adam = (bench_step.measured(name, SMALL, x, x, rounds=1) for name in ("sgd", "adam"))
    assert sgd.flops == adam.flops == 2 * len(x) * (3 * (PARAMETERS - 29) - 12 * 7)
    assert sgd.floats == 1
    # two moments, and a step number for each of eight tensors, of the default dtype: float64
    assert adam.floats == pytest.approx(2 + 2 * 8 / PARAMETERS)


def test_what_kfac_keeps(x):
    """A and G with their inverses, and the momentum."""
    sizes = [(7, 13), (3, 8), (7, 4), (12, 8)]
    floats = sum(2 * o * o + 2 * i * i + o * i for o, i in sizes)
    cost = bench_step.measured("kfac", SMALL, x, x, rounds=1)
    assert cost.floats == pytest.approx(floats / PARAMETERS, rel=0.2)  # and some counters


def test_what_kfac_multiplies(x):
    """SGD's products, one more backward to activations, two moments in place, and G⁻¹ M A⁻¹."""
    layers, n = [(7, 12), (3, 7), (7, 3), (12, 7)], len(x)
    sgd = bench_step.measured("sgd", SMALL, x, x, rounds=1).flops
    backward = sum(2 * n * o * i for o, i in layers[1:])
    moments = sum(2 * n * (o * o + i * i) for o, i in layers)
    sandwich = sum(2 * o * (i + 1) * (o + i + 1) for o, i in layers)
    cost = bench_step.measured("kfac", SMALL, x, x, rounds=1)
    assert cost.flops == sgd + backward + moments + sandwich


def test_a_period_holds_one_refresh_and_no_more(x):
    one_step, kfac = bench_step.prepared("kfac", SMALL, x, x)
    bench_step._skip_to(kfac, bench_step.PAST)
    weight = next(iter(kfac.state))
    refreshed = []
    for _ in range(bench_step.PERIOD):
        before = kfac.state[weight]["A_inv"].clone()
        one_step()
        refreshed.append(not torch.equal(before, kfac.state[weight]["A_inv"]))
    assert sum(refreshed) == 1
    assert len(bench_step.period(one_step)) == bench_step.PERIOD


def test_views_of_one_memory_count_once():
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    memory = torch.zeros(8, dtype=torch.float32)
    optimizer.state[parameter] = {"left": memory[:4], "rest": [memory[4:], {"again": memory}]}
    assert bench_step.floats_per_parameter(optimizer) == 8 / 4


def test_a_loss_that_is_not_finite_is_told_of(x):
    with pytest.raises(RuntimeError, match="the loss of 'sgd' is nan"):
        bench_step.measured("sgd", SMALL, x, x * torch.nan, rounds=1)


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    with bench_step.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_the_table_has_the_targets_beside_the_ratios():
    costs = [
        bench_step.StepCost("kfac", 0.3, 0.1, 1.5, 6e9, 5.0),
        bench_step.StepCost("sgd", 0.1, 0.1, 1.0, 2e9, 1.0),
    ]
    table = bench_step._table(costs, "title")
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["sgd", "kfac"]
    assert columns[2] == ["1.00", "3.00"]
    assert columns[3] == ["", "≤ 2.5"]
    assert columns[5] == ["1.00", "3.00"]
    assert set(bench_step.TARGETS) <= {"mbf", "shampoo", "tnt", *optimizers.OPTIMIZERS}
