"""The bench of a CG iteration, on a small problem; no time is asserted."""

import pytest
import torch

from kronscope.studies import problems
from kronscope.studies.bench import hessian_free as bench

SMALL = problems.get("digits-autoencoder-small")


@pytest.fixture
def costs(monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 2)
    x = torch.rand(30, 64, dtype=torch.float32)
    return [
        bench.measured(name, SMALL, x, blocks)
        for name, blocks in (("plain", None), ("three blocks", bench.thirds(SMALL.model())))
    ]


def test_the_arithmetic_is_that_of_the_floors(costs):
    """Counted, not timed: J v and Jᵀw are 8 N P over 6, less the first layer's inputs."""
    plain, blocks = costs
    assert 1.2 < plain.flops[0] / plain.flops[1] < 4 / 3
    assert 1.0 < blocks.flops[0] / plain.flops[0] <= 1.5
    assert plain.gradient > 0


def test_the_table(costs):
    table = bench._table(costs, "title")
    assert table.row_count == 2
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["plain", "three blocks"]
    assert cells[3] == ["≤ 1.6", ""]
    assert cells[5] == ["", "≤ 1.8"]
    assert cells[4][0] == "1.00"


def test_thirds_are_of_equal_products():
    model = problems.get("mnist-autoencoder").model()
    groups = bench.thirds(model)
    weights = [sum(model.get_submodule(n).weight.numel() for n in group) for group in groups]
    assert sum(len(group) for group in groups) == 8
    assert max(weights) < 0.5 * sum(weights)


def test_iterations_that_were_not_made_are_noticed():
    x = torch.zeros(4, 64, dtype=torch.float32)  # a gradient of rank one or so
    step = bench._prepared(SMALL, x, None)
    with pytest.raises(RuntimeError, match="ended before 500 iterations"):
        step(500)
