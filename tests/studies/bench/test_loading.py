"""The bench of loading, on small problems; no time is asserted."""

import dataclasses

import pytest
import requests
import torch

from kronscope.studies import data, problems, training
from kronscope.studies.bench import BENCHES
from kronscope.studies.bench import loading as bench

SMALL = [problems.get(f"{name}-small") for name in bench.NAMES]


def test_what_is_compared():
    """The papers' problems of each kind, with augmentation and without."""
    found = bench.chosen()
    names = [*bench.NAMES[:3], "cifar10-subset-cnn, augmented", bench.NAMES[3]]
    assert [problem.name for problem in found] == names
    assert [problem.augment is not None for problem in found] == [False] * 3 + [True] * 2
    assert found[3].augment is found[4].augment
    assert BENCHES["loading"] is bench.loading


def test_a_batch_is_loaded_and_augmented_before_each_step(monkeypatch):
    problem, real, seen = SMALL[3], training.batch, []

    def batch(state, settings):
        seen.append((state.step, *real(state, settings)))

    monkeypatch.setattr(training, "batch", batch)
    cost = bench.measured(problem, steps=4)
    assert [step for step, _, _ in seen] == list(range(bench.BEFORE + 4))
    assert cost.batch == len(seen[0][1]) == problem.batch_size
    assert cost.loading > 0
    assert cost.share == cost.loading / cost.step > 0
    plain = dataclasses.replace(problem, augment=None)
    settings = training.Settings(plain, "sgd", 1)
    assert not torch.equal(real(training.start(settings), settings)[0], seen[0][1])


def test_loading_once_more_changes_no_step():
    settings = training.Settings(SMALL[3], "sgd", 1)
    weights = []
    for looked in (False, True):
        for state in training.steps(settings):
            if looked:
                first, again = (training.batch(state, settings)[0] for _ in range(2))
                assert torch.equal(first, again)
        weights.append(list(state.model.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.usefixtures("_nowhere")
def test_the_table_says_why_a_problem_is_left_out():
    table = bench.compared([*SMALL, problems.get("mnist-autoencoder")], steps=2)
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == [problem.name for problem in SMALL]
    assert cells[1] == ["150", "50", "50", "50"]
    assert all(share.endswith("%") for share in cells[4])
    assert set(cells[5]) == {"< 50%"}
    assert "not timed: mnist-autoencoder: MNIST is neither in $KRONSCOPE_DATA" in table.caption


@pytest.fixture
def _nowhere(tmp_path, monkeypatch):
    """No data, and downloads that would be noticed."""
    monkeypatch.delenv("KRONSCOPE_DATA", raising=False)
    monkeypatch.setenv("KRONSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(requests, "get", lambda *_, **__: pytest.fail("fetched"))


@pytest.mark.usefixtures("_nowhere")
def test_without_downloads_what_is_not_there_is_missing(tmp_path):
    with (
        data.without_downloads(),
        pytest.raises(FileNotFoundError, match="and nothing is fetched now; set KRONSCOPE_DATA"),
    ):
        data.cifar10()
    assert not list(tmp_path.iterdir())
