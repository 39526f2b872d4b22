"""A run that was trained, written and pickled when the packages were `studies` and `optim`.

tests/reference/earlier_run.tar.xz: `kronscope train digits-autoencoder-small --optimizer kfac
--epochs 2` at commit 390ea75, before there was one import name.
"""

import tarfile
import zipfile

import pytest
from rich.progress import Progress

from kronscope.studies import problems
from kronscope.studies.experiments import train as runs
from kronscope.studies.measuring.table import blocks_table
from kronscope.studies.reports.report import write_report
from kronscope.studies.results import records
from kronscope.studies.training import checkpoints
from tests.paths import REFERENCE


@pytest.fixture
def run(tmp_path):
    with tarfile.open(REFERENCE / "earlier_run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    return folder


def test_its_records_and_report(run):
    frame = records.read(run)
    assert frame.attrs["damaged"] == []
    assert list(frame["step"]) == [0, 0, 10, 10, 20, 20]
    assert records.runs(run.parent) == [run]
    text = write_report(run).read_text()
    assert "digits-autoencoder-small" in text
    assert (run / "figures" / "loss-epoch.png").is_file()


def test_its_checkpoint_names_no_module_of_ours(run):
    """So that no later renaming can matter."""
    with zipfile.ZipFile(run / runs.CHECKPOINT) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        pickled = archive.read(name)
    assert b"collections" in pickled
    assert not any(word in pickled for word in (b"studies", b"optim.", b"diag", b"kronscope"))


def test_it_goes_on_bit_for_bit(run):
    """The loss after the third epoch is that of the earlier version going on with it."""
    settings = runs.settings(None, {"epochs": 3}, run)
    assert settings.problem is problems.get("digits-autoencoder-small")
    with Progress(disable=True) as progress:
        outcome = runs.train(settings, run.parent, progress, run)
    frame = outcome.frame[outcome.frame["metric"] == "train_loss"]
    assert list(frame["step"]) == [0, 10, 20, 30]
    # another processor may add in another order
    assert frame["value"].iloc[-1] == pytest.approx(27.22109095255534, rel=1e-4)
    header = records.read_header(run)
    assert header["status"] == "finished"
    assert header["commit"].startswith("390ea75")
    assert len(header["resumed"]) == 1


def test_its_parameters_are_measured(run):
    path = run / runs.CHECKPOINT
    assert blocks_table("digits-autoencoder-small", "4", "ggn", 8, path, 0).row_count > 6
    with pytest.raises(ValueError, match="is no checkpoint of mnist16-tanh-small: digits-auto"):
        checkpoints.load_model(problems.get("mnist16-tanh").model(), "mnist16-tanh-small", path)
