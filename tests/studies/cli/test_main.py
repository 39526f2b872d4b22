"""The command line, as a user types it."""

import re
import sys

import pytest
from typer.testing import CliRunner

from kronscope.studies.cli import main as cli
from kronscope.studies.results import records
from tests import synthetic
from tests.pools import in_process

runner = CliRunner()


def invoke(*words):
    return runner.invoke(cli.app, [str(word) for word in words])


@pytest.fixture
def _in_process():
    with in_process():
        yield


def test_problems():
    found = invoke("problems")
    assert found.exit_code == 0
    assert "digits-autoen" in found.output
    assert "mnist-autoenc" in found.output


def test_train_prints_losses_and_resumes(tmp_path):
    words = ("train", "digits-autoencoder", "--optimizer", "kfac", "--results", tmp_path)
    assert invoke(*words, "--epochs", 1).exit_code == 0
    (run,) = tmp_path.iterdir()
    with in_process():
        found = invoke("train", "--epochs", 2, "--resume", run, "--measure", 0.9)
    assert found.exit_code == 0
    assert "train loss" in found.output
    assert "measured 1 time(s) in" in found.output
    assert list(records.read(run)["step"].unique()) == [0, 10, 20]


def test_a_diverging_run_says_so_and_exits_with_3(tmp_path):
    found = invoke(
        "train", "digits-autoencoder", "--optimizer", "sgd", "--lr", 100, "--results", tmp_path
    )
    assert found.exit_code == 3
    assert "training diverged at step" in found.output
    (run,) = tmp_path.iterdir()
    assert (run / "last-finite.pt").is_file()


def test_measure_one_block(tmp_path):
    words = ("measure", "digits-autoencoder", "--block", "4", "--examples", 16)
    found = invoke(*words)
    assert found.exit_code == 0
    assert len(re.findall("kfac", found.output)) == 6
    invoke("train", "digits-autoencoder", "--epochs", 1, "--results", tmp_path)
    (run,) = tmp_path.iterdir()
    trained = invoke(*words, "--checkpoint", run / "checkpoint.pt")
    assert trained.exit_code == 0
    assert trained.output != found.output


@pytest.mark.usefixtures("_in_process")
def test_compare_optimizers_and_add_one_to_the_run(tmp_path):
    words = ("study", "optimizers_compared", "--tiny", "--epochs", 1, "--results", tmp_path)
    found = invoke(*words, "--optimizers", "adam")
    assert found.exit_code == 0, found.output
    assert "SGD-momentum needs" in " ".join(found.output.split())
    (run,) = tmp_path.iterdir()
    words = ("study", "optimizers_compared", "--resume", run, "--optimizers", "adam,sgd")
    found = invoke(*words)
    assert found.exit_code == 0, found.output
    assert set(records.read(run)["optimizer"]) == {"adam", "sgd"}
    config = records.read_header(run)["config"]
    assert (config["epochs"], config["optimizers"]) == (1, ["adam", "sgd"])
    assert (run / "report.html").is_file()


@pytest.mark.usefixtures("_in_process")
def test_tune_and_go_on_with_the_same_settings(tmp_path):
    words = ("tune", "grid", "digits-autoencoder-small", "--results", tmp_path)
    found = invoke(*words, "--optimizer", "adam", "--epochs", 1, "--lr-factors", "0.5,1")
    assert found.exit_code == 0, found.output
    assert "lr 0.01*" in found.output
    (run,) = tmp_path.iterdir()
    assert (run / "report.html").is_file()
    found = invoke(*words, "--resume", run, "--lr-factors", "0.5,1,2")
    assert found.exit_code == 0, found.output
    config = records.read_header(run)["config"]
    assert (config["optimizer"], config["epochs"]) == ("adam", 1)
    assert len(records.read_header(run)["comparison"]["rows"]) == 3


@pytest.mark.usefixtures("_in_process")
def test_tune_what_is_listed_and_go_on(tmp_path):
    words = ("tune", "searched", "mnist-autoencoder-small", "--results", tmp_path)
    found = invoke(*words, "--optimizer", "sgd", "--epochs", 1)
    assert found.exit_code == 0, found.output
    (run,) = tmp_path.iterdir()
    header = records.read_header(run)
    assert header["config"]["optimizer"] == "sgd"
    assert len(header["comparison"]["rows"]) == 6
    assert invoke(*words, "--resume", run).exit_code == 0
    assert records.read_header(run)["comparison"]["rows"] == header["comparison"]["rows"]


def test_report_is_written_again(tmp_path):
    records.write_header(tmp_path, synthetic.HEADER)
    records.append(tmp_path, [synthetic.row(optimizer="adam", step=0, metric="cosine", value=1.0)])
    for _ in range(2):
        assert invoke("report", tmp_path).exit_code == 0
        assert "digits-autoencoder" in (tmp_path / "report.html").read_text()
        (tmp_path / "report.html").unlink()


def test_study_of_sharpness_takes_its_sizes(tmp_path):
    words = ("study", "sharpness_along_training", "--tiny", "--optimizers", "kbfgs")
    sizes = ("--seeds", 1, "--steps", 3, "--layers-every", 1, "--examples", 8)
    assert invoke(*words, *sizes, "--results", tmp_path).exit_code == 0
    found = records.read(next(tmp_path.iterdir()))
    assert set(found["step"]) == {0, 1, 2}
    sharpness = found[found["metric"] == "sharpness"]
    assert set(sharpness["n"]) == {8}
    assert set(sharpness["block"]) > {"", "0"}  # the whole, and layers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "nonsense"), "no problem 'nonsense'; known:"),
        (("study", "nonsense"), "no study 'nonsense'; known: ['error_along_training',"),
        (("study", "error_along_training", "--seeds", "2"), "has no option ['seeds']; it has"),
        (("study", "error_along_training", "--resume", "."), "cannot go on with an earlier run"),
        (("study", "optimizers_compared", "--resume", "."), "holds study and problem (None, None)"),
        (("study", "optimizers_compared", "--lr-factors", "1,x"), "takes positive numbers with"),
        (
            ("study", "optimizers_compared", "--damping-factors", "0"),
            "positive numbers with commas",
        ),
        (("bench", "nonsense"), "no bench 'nonsense'; known: ['exact', 'scale', 'step', 'hf',"),
        (("tune", "grid", "nonsense"), "no problem 'nonsense'; known:"),
        (("tune", "halving", "digits-autoencoder", "--lr-factors", "0"), "positive numbers with"),
        (
            ("tune", "searched", "mnist-autoencoder-tanh", "--optimizer", "kfac"),
            "lists nothing searched of 'kfac'; it does so of ['adam', 'block_hessian_free',",
        ),
        (("train", "digits-autoencoder", "--device", "gpu"), "no device 'gpu'; known: ['cpu'"),
        (("train", "digits-autoencoder", "--batch-size", "-5"), "batch_size is -5; it is a whole"),
        (("train", "digits-autoencoder", "--epochs", "-1"), "epochs is -1; it is a whole number"),
        (("train", "digits-autoencoder", "--seed", "-1"), "seed is -1; it is a whole number of at"),
        (("study", "optimizers_compared", "--device", "gpu"), "no device 'gpu'; known: ['cpu'"),
        (("study", "stability", "--seeds", "0"), "seeds is 0; it is a whole number of at least 1"),
        (("study", "stability", "--lr-factors", "inf"), "positive numbers with commas"),
        (("tune", "grid", "digits-autoencoder", "--workers", "0"), "workers is 0; it is a whole"),
        (("tune", "halving", "digits-autoencoder", "--seed", "-1"), "seed is -1; it is a whole"),
        (("measure", "digits-autoencoder", "--examples", "-5"), "examples is -5; it is a whole"),
        (("train", "digits-autoencoder", "--measure", "20"), "takes a share in (0, 1)"),
        (("tune", "grid", "digits-autoencoder", "--resume", "."), "and problem (None, None)"),
        (("report", "nowhere"), "no run folder nowhere"),
        (("measure", "digits-autoencoder", "--block", "99"), "no block '99'; known: ['0', '2'"),
        (("measure", "digits-autoencoder", "--truth", "fishy"), "no truth 'fishy'; known:"),
        (("measure", "digits-autoencoder", "--checkpoint", "no.pt"), "no checkpoint no.pt"),
        (("train", "digits-autoencoder", "--optimizer", "x"), "no optimizer 'x'; known:"),
    ],
)
def test_errors_are_one_line(words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kronscope", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert message in printed
    assert "Traceback" not in printed
