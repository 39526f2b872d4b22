"""Options that cannot be are refused everywhere, with the value and what can, before any work."""

import dataclasses
import doctest
import importlib

import pytest
import torch
from rich.progress import Progress

from kronscope.studies import problems
from kronscope.studies.experiments import STUDIES
from kronscope.studies.experiments import train as runs
from kronscope.studies.measuring import table as blocks_table
from kronscope.studies.results import options as checks
from kronscope.studies.training import loop as training
from kronscope.studies.tuning import run as tuning
from kronscope.studies.tuning.searches import Grid, Halving, Listed

SMALL = problems.get("digits-autoencoder-small")
BAD = {  # what cannot be given, and what is said of it
    "epochs": (-1, "epochs is -1; it is a whole number of at least 0"),
    "tune_epochs": (1.5, "tune_epochs is 1.5; it is a whole number of at least 0"),
    "batch_size": (-5, "batch_size is -5; it is a whole number of at least 0"),
    "seed": (2**32, "seed is 4294967296; it is at most 4294967295"),
    "seeds": (0, "seeds is 0; it is a whole number of at least 1"),
    "spares": (-2, "spares is -2; it is a whole number of at least 0"),
    "longer": (0, "longer is 0; it is a whole number of at least 1"),
    "steps": (-3, "steps is -3; it is a whole number of at least 1"),
    "layers_every": (-1, "layers_every is -1; it is a whole number of at least 0"),
    "examples": (0, "examples is 0; it is a whole number of at least 1"),
    "points": (0, "points is 0; it is a whole number of at least 1"),
    "damped_every": (0, "damped_every is 0; it is a whole number of at least 1"),
    "workers": (0, "workers is 0; it is a whole number of at least 1"),
    "device": ("gpu", r"no device 'gpu'; known: \['cpu'"),
    "lr_factors": ((1.0, -2.0), r"lr_factors are \[1.0, -2.0\]; they are positive, finite numbers"),
    "damping_factors": ((float("nan"),), "damping_factors are .nan.; they are positive"),
    "adam_lr_factors": ((float("inf"),), "adam_lr_factors are .inf.; they are positive"),
    "seconds": ((0.0,), r"seconds are \[0.0\]; they are positive, finite numbers"),
}
GRIDS = {name: importlib.import_module(module) for name, module in STUDIES.items()}
OPTIONS = [
    (name, field.name)
    for name, module in GRIDS.items()
    for field in dataclasses.fields(module.Grid)
    if field.name not in ("problem", "optimizers", "cures")
]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_every_option_of_every_study_is_checked(tmp_path, name, option):
    value, said = BAD[option]
    grid = dataclasses.replace(GRIDS[name].TINY, **{option: value})
    with Progress(disable=True) as progress, pytest.raises(ValueError, match=said):
        GRIDS[name].run(grid, tmp_path, progress)
    assert not list(tmp_path.iterdir())


def test_how_many_there_are():
    assert len(OPTIONS) >= 40
    assert set(BAD) == {*checks.LEAST, *checks.POSITIVE, "device"}


@pytest.mark.parametrize("search", [Grid, Halving, Listed])
@pytest.mark.parametrize("option", ["epochs", "seed", "workers", "device", "lr_factors"])
def test_searches_are_checked(tmp_path, search, option):
    value, said = BAD[option]
    if option not in {field.name for field in dataclasses.fields(search)}:
        pytest.skip("it has no such option")
    chosen = search("mnist-autoencoder-small", "adam", **{option: value})
    with Progress(disable=True) as progress, pytest.raises(ValueError, match=said):
        tuning.run(chosen, tmp_path, progress)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["epochs", "seed", "batch_size"])
@pytest.mark.parametrize("value", [-1, 0.5, "3", None, True])
def test_settings_are_checked(option, value):
    with pytest.raises(ValueError, match=f"{option} is {value!r}; it is a whole number of at "):
        training.Settings(SMALL, "sgd", **{"epochs": 1, option: value})


@pytest.mark.parametrize("name", ["gpu", "cuda", "cuda:1", "cuda:x", "", "meta"])
def test_devices(monkeypatch, tmp_path, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = training.Settings(SMALL, "sgd", 1, device=name)
    why = r" \(PyTorch finds no CUDA here\)" if name.startswith("cuda") else ""
    said = rf"no device '{name}'{why}; known: \['cpu'\]"
    with pytest.raises(ValueError, match=said):
        training.start(chosen)
    with Progress(disable=True) as progress, pytest.raises(ValueError, match=said):
        runs.train(chosen, tmp_path, progress)
    assert not list(tmp_path.iterdir())


def test_a_cuda_device_has_to_be_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        checks.device(name)
    with pytest.raises(ValueError, match=r"'cuda:2'; known: \['cpu', 'cuda', 'cuda:0', 'cuda:1'\]"):
        checks.device("cuda:2")


def test_a_run_of_a_device_that_is_gone_goes_on_elsewhere(monkeypatch, tmp_path):
    with Progress(disable=True) as progress:
        first = runs.train(training.Settings(SMALL, "sgd", 1), tmp_path, progress).folder
        header = (first / "header.json").read_text()
        (first / "header.json").write_text(header.replace('"device": "cpu"', '"device": "cuda"'))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="no device 'cuda'"):
            runs.train(runs.settings(None, {}, first), tmp_path, progress, resume=first)
        again = runs.settings(None, {"device": "cpu", "epochs": 2}, first)
        assert runs.train(again, tmp_path, progress, resume=first).frame["epoch"].max() == 2


@pytest.mark.parametrize(("examples", "seed"), [(0, 0), (-5, 0), (8, -1)])
def test_measurements_are_checked(examples, seed):
    with pytest.raises(ValueError, match="whole number of at least"):
        blocks_table.blocks_table(SMALL.name, "0", "ggn", examples, None, seed)


def test_examples_in_docstrings():
    found = doctest.testmod(checks)
    assert found.failed == 0 < found.attempted
