"""The small convolutional classifiers: network, data, training with accuracies."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from kronscope.studies import data, problems
from kronscope.studies.data import colour
from kronscope.studies.experiments import train as runs
from kronscope.studies.problems import _networks as networks
from kronscope.studies.results.records import frame_of, loss_row
from kronscope.studies.training import loop as training
from kronscope.studies.training import optimizers

SMALL = problems.get("cifar10-subset-cnn-small")
WHOLE = problems.get("cifar10-subset-cnn")

needs_files = pytest.mark.skipif(
    not list(Path(os.environ.get("KRONSCOPE_DATA", "/nowhere")).glob("cifar10*")),
    reason="needs the real files in $KRONSCOPE_DATA/cifar10*",
)


def test_the_network():
    model = WHOLE.model()
    layers = [m for m in model if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in layers] == [
        (32, 3, 3, 3),
        (64, 32, 3, 3),
        (64, 64, 3, 3),
        (10, 1024),
    ]
    assert all(layer.bias is not None for layer in layers)
    assert sum(p.numel() for p in model.parameters()) == 66_570
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert networks.strided_cnn((1, 2), 4, classes=3)(torch.randn(5, 1, 4, 4)).shape == (5, 3)


def test_made_up_pictures_are_always_the_same():
    found, again = data.made_up_pictures(), data.made_up_pictures()
    assert found.train_inputs.shape == (400, 3, 32, 32)
    assert found.test_targets.shape == (200,)
    assert found.train_inputs.dtype == torch.float32
    assert found.train_targets.dtype == torch.int64
    assert found.train_targets.unique().tolist() == list(range(10))
    assert torch.equal(found.train_inputs, again.train_inputs)


LIMITS = dict.fromkeys([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"], 1017)
LIMITS["data_batch_1"] = 4000


@pytest.fixture
def batches(tmp_path, monkeypatch, publish):
    """Made-up files of CIFAR-10, each picture filled with its place in its file, modulo 256.

    One picture longer than the subset's. The function changes them.
    """
    (tmp_path / "cifar10").mkdir()
    for name, limit in LIMITS.items():
        places = torch.arange(limit + 1, dtype=torch.uint8)
        content = places[:, None].repeat(1, 3073)
        content[:, 0] = int(name[-1]) if name[-1].isdigit() else 9
        (tmp_path / "cifar10" / f"{name}.bin").write_bytes(content.numpy().tobytes())
        publish("the subset of CIFAR-10", f"{name}.bin", content[:limit].numpy().tobytes())
    monkeypatch.setenv("KRONSCOPE_DATA", str(tmp_path))
    return tmp_path / "cifar10"


def test_the_subset_of_whole_files_is_cut(batches):
    found = data.cifar10_subset()
    assert found.train_targets.bincount().tolist() == [0, 4000, 1017, 1017, 1017, 1017]
    assert found.test_targets.tolist() == [9] * 1017
    with pytest.raises(ValueError, match=r"data_batch_1\.bin has .*cifar10-subset-cnn\)"):
        data.cifar10()
    (batches / "data_batch_2.bin").rename(batches / "data_batch_2_first1018.bin")
    assert torch.equal(data.cifar10_subset().train_inputs, found.train_inputs)


def changed(path):
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


BAD_BATCHES = {  # what is done to data_batch_3.bin, and what is said of it
    "missing": (
        lambda p: p.unlink(),
        "is missing; expected 1,017 records of CIFAR-10 .* 3,125,241",
    ),
    "cut": (
        lambda p: p.write_bytes(p.read_bytes()[: 1016 * 3073]),
        "has 3,122,168 bytes; expected 1,017 records .*, 3,125,241 bytes or more, up to 10,000",
    ),
    "cut inside a record": (
        lambda p: p.write_bytes(p.read_bytes()[:-1]),
        "has 3,128,313 bytes; expected 1,017 records .*, 3,125,241 bytes or more",
    ),
    "a changed byte": (changed, "not its content .*: it was changed, or is of another data set"),
    "a copy of another": (
        lambda p: p.write_bytes(p.with_name("data_batch_2.bin").read_bytes()[: 1017 * 3073]),
        "not its content .*: it is the data_batch_2.bin of the subset of CIFAR-10",
    ),
}


@pytest.mark.parametrize(("change", "said"), BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_a_bad_batch_is_named_with_what_was_expected(batches, change, said):
    path = batches / "data_batch_3.bin"
    change(path)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        data.cifar10_subset()
    assert str(error.value).startswith(str(path))
    assert "; get https://www.cs" in str(error.value) or "; delete it and" in str(error.value)


@pytest.mark.parametrize("changed_there", [None, "data_batch_2.bin", "test_batch.bin"])
def test_whole_batches_are_held_to_their_checksums(batches, monkeypatch, publish, changed_there):
    monkeypatch.setattr(colour, "BATCH", 20)
    for path in batches.iterdir():
        path.write_bytes(path.read_bytes()[: 20 * 3073])
        publish("CIFAR-10", path.name, path.read_bytes())
    if changed_there is None:
        assert data.cifar10().train_targets.tolist() == sorted([*range(1, 6)] * 20)
        return
    (batches / changed_there).write_bytes((batches / "data_batch_1.bin").read_bytes())
    with pytest.raises(ValueError, match=f"{changed_there} has .* data_batch_1.bin of CIFAR-10;"):
        data.cifar10()


@needs_files
def test_the_real_subset():
    found = WHOLE.data()
    assert found.train_inputs.shape == (8068, 3, 32, 32)
    # as counted in the published labels of these pictures
    first = found.train_targets[:4000].bincount().tolist()
    assert first == [396, 366, 420, 384, 422, 393, 414, 385, 407, 413]
    tests = found.test_targets.bincount().tolist()
    assert tests == [105, 93, 100, 104, 92, 87, 114, 102, 110, 110]


def test_accuracies_by_hand():
    state = training.start(training.Settings(SMALL, "sgd", epochs=1))
    found = training.evaluate(state, SMALL, chunk=64)
    assert set(found) == {"train_loss", "test_loss", "train_accuracy", "test_accuracy"}
    output = state.model(state.data.test_inputs)
    right = [
        int(row.argmax()) == int(t) for row, t in zip(output, state.data.test_targets, strict=True)
    ]
    assert found["test_accuracy"] == sum(right) / 200
    # float32 sums of 200 numbers near 2, in another order
    loss = nn.functional.cross_entropy(output, state.data.test_targets).item()
    assert found["test_loss"] == pytest.approx(loss, rel=1e-5)


def test_autoencoders_have_no_accuracy():
    digits = problems.get("digits-autoencoder-small")
    state = training.start(training.Settings(digits, "sgd", epochs=1))
    assert set(training.evaluate(state, digits)) == {"train_loss", "test_loss"}


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_first_order_methods_learn_the_made_up_classes(name):
    *_, state = training.steps(training.Settings(SMALL, name, SMALL.epochs))
    found = training.evaluate(state, SMALL)
    assert found["train_accuracy"] > 0.5  # a guess is right once in ten times
    assert found["train_loss"] < 0.8 * 2.3026


def test_tables_show_accuracies():
    shared = {"run": "r", "study": "train", "problem": "p", "optimizer": "sgd", "seed": 0}
    shared |= {"step": 0, "epoch": 0.0, "seconds": 1.0}
    names = ("test_accuracy", "train_accuracy", "test_loss", "train_loss")
    frame = frame_of({**shared, **loss_row(name, i)} for i, name in enumerate(names))
    table = runs.table(frame)
    expected = ["train loss", "test loss", "train accuracy", "test accuracy"]
    assert table.columns == ("epoch", "seconds", *expected)
    assert table.rows[0][2:] == ["3.0000", "2.0000", "1.0000", "0.0000"]


def test_optimizers_that_sample_labels_are_told_of_the_classes():
    state = training.start(training.Settings(SMALL, "kfac", epochs=1))
    assert state.optimizer.param_groups[0]["likelihood"] == "categorical"
    assert set(optimizers.OPTIMIZERS) - set(optimizers.UNTUNED) <= set(SMALL.optimizers)
