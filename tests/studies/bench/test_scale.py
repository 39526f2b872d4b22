"""The pieces of `kronscope bench scale` on problems of seconds, and what it reads."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from kronscope.diag import Problem
from kronscope.diag.approximations import kbfgs
from kronscope.studies import data
from kronscope.studies.bench import scale as bench_scale
from kronscope.studies.problems import _networks as networks


def small_cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 5),
    ).float()


def test_every_column_of_every_layer_with_intervals():
    x, t = torch.randn(12, 3, 7, 7).float(), torch.randint(5, (12,))
    problem = Problem(small_cnn().eval(), cross_entropy, x, t)
    layers = [problem.block(name) for name in ("0", "3", "6")]
    found = bench_scale.timed(
        "small",
        lambda: dict(bench_scale.cells(problem, layers, lambda b: kbfgs(problem, b, steps=3))),
    )
    assert list(found.cells) == ["0", "3", "6"]
    for row in found.cells.values():
        assert {f"best r={r}" for r in range(1, 11)} < set(row)
        assert set(bench_scale.COLUMNS) <= set(row)
        for cell in row.values():
            value, low, high = (
                float(part) for part in cell.strip("]").replace("[", ",").split(",")
            )
            # three printed digits
            assert low <= value * 1.01 + 1e-9
            assert value <= high * 1.01 + 1e-9
    assert found.seconds > 0
    assert found.flops > 12 * 2 * 3 * 9 * 4  # at least the first convolution's own
    assert found.floor < found.seconds
    assert found.peak > 0.1


def test_resnet32_is_the_published_one():
    model = networks.resnet32().double()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 31
    assert sum(p.numel() for p in model.parameters()) == 464_154
    assert all(c.bias is None for c in convolutions)
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 10)
    # the shortcut that widens: every second pixel, eight channels of zeros on each side
    block = networks.BasicBlock(16, 32, 2).double().eval()
    nn.init.zeros_(block.norm2.weight)
    h = torch.rand(1, 16, 4, 4)
    out = block(h)
    assert torch.equal(out[:, 8:24], h[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def write_records(folder, labels):
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    records = np.concatenate([np.array(labels, dtype=np.uint8)[:, None], pixels], axis=1)
    for name in ("data_batch_1.bin", "test_batch.bin"):
        records.tofile(folder / name)
    return records


def test_cifar_records(tmp_path, monkeypatch, publish):
    folder = tmp_path / "cifar10"
    folder.mkdir()
    records = write_records(folder, [3, 9])
    monkeypatch.setenv("KRONSCOPE_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"data_batch_1.bin has 6,146 bytes; expected 10,000"):
        data.cifar10()
    monkeypatch.setattr(data.colour, "BATCH", 2)
    monkeypatch.setattr(data.colour, "BATCHES", [["data_batch_1"], ["test_batch"]])
    for name in ("data_batch_1.bin", "test_batch.bin"):
        publish("CIFAR-10", name, records.tobytes())
    found = data.cifar10()
    assert found.train_targets.tolist() == [3, 9]
    assert found.train_inputs.shape == (2, 3, 32, 32)
    red = records[0, 1 + 5 * 32 + 7] / 255  # row 5, column 7
    expected = (red - data.CIFAR_MEAN[0]) / data.CIFAR_STD[0]
    assert found.train_inputs[0, 0, 5, 7].item() == pytest.approx(expected, rel=1e-5)
    write_records(folder, [3, 12])
    with pytest.raises(ValueError, match="label 12; CIFAR-10 has 0 to 9"):
        data.cifar10()


@pytest.mark.skipif(
    not list(Path(os.environ.get("KRONSCOPE_DATA", "/nowhere")).glob("cifar10*")),
    reason="needs the real files in $KRONSCOPE_DATA/cifar10*",
)
def test_real_cifar():
    found = data.cifar10_subset()
    assert len(found.train_inputs) == len(found.train_targets) >= 4000
    assert found.train_targets.unique().tolist() == list(range(10))
    assert found.train_inputs.mean().abs() < 0.1
    # the customary deviations are those within a picture, so that the whole set's is about 1.25
    assert found.train_inputs.std().item() == pytest.approx(1.25, abs=0.1)
