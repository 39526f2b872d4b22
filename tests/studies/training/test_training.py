"""Training: any optimizer, exact resume, divergence with the last good state kept."""

import dataclasses
import math
import os
import signal

import pytest
import torch
from loky.process_executor import TerminatedWorkerError
from rich.progress import Progress

from kronscope.studies import problems
from kronscope.studies.experiments import train as runs
from kronscope.studies.measuring.during_training import DuringTraining
from kronscope.studies.results import records
from kronscope.studies.training import checkpoints, optimizers
from kronscope.studies.training import loop as training

DIGITS = problems.get("digits-autoencoder")


def settings(optimizer, **changes):
    return training.Settings(DIGITS, optimizer, **{"epochs": 2, **changes})


@pytest.mark.parametrize("name", sorted(optimizers.OPTIMIZERS))
def test_every_optimizer_lowers_the_loss(name):
    """By a quarter; a step of Hessian-free is worth several."""
    losses = list_losses(settings(name, epochs=1 if name in optimizers.HESSIAN_FREE else 4))
    assert losses[-1] < 0.75 * losses[0], (name, losses)


def list_losses(chosen):
    found = []
    for state in training.steps(chosen):
        if state.step % state.steps_per_epoch == 0:
            found.append(training.evaluate(state, chosen.problem)["train_loss"])
    assert len(found) == chosen.epochs + 1
    return found


def test_seconds_count_training_only():
    for state in training.steps(settings("adam", epochs=1)):
        before = state.seconds
        torch.linalg.eigvalsh(torch.randn(300, 300))
        assert state.seconds == before
    assert state.seconds > 0
    assert state.epoch == 1


@pytest.mark.parametrize("name", ["kbfgs", "kbfgs_l", "kfac", "adam"])
def test_resume_is_exact(tmp_path, name):
    chosen = settings(name)
    for state in training.steps(chosen):
        if state.step == state.steps_per_epoch + 3:
            checkpoints.save(state, tmp_path / "here.pt")
    whole = {k: v.clone() for k, v in state.model.state_dict().items()}
    for state in training.steps(chosen, resume=tmp_path / "here.pt"):
        assert state.step >= state.steps_per_epoch + 3
    for key, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, whole[key]), key


DROPOUT = training.Settings(problems.get("cifar10-allcnn-dropout-small"), "sgd", 2)


def test_what_drops_out_depends_on_seed_and_step_alone(tmp_path):
    """Whatever was drawn before in this process, and in a resumed run as in the whole one."""

    def final(resume=None):
        for state in training.steps(DROPOUT, resume):
            if state.step == state.steps_per_epoch + 1 and resume is None:
                checkpoints.save(state, tmp_path / "here.pt")
        return {k: v.clone() for k, v in state.model.state_dict().items()}

    assert any(isinstance(m, torch.nn.Dropout) for m in training.start(DROPOUT).model.modules())
    before = torch.get_rng_state()
    whole = final()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    for other in (final(), final(tmp_path / "here.pt")):
        assert all(torch.equal(tensor, whole[key]) for key, tensor in other.items())


def test_batches_have_the_size_asked_for():
    state = training.start(settings("sgd", batch_size=400))  # of 1,500 examples
    assert state.steps_per_epoch == 3
    assert len(training._rows(state, seed=0)) == 400
    assert [len(rows) for rows in training._blocks(state)] == [400] * 3


def test_what_counts_as_diverged_is_kept_by_a_checkpoint(tmp_path):
    *_, state = training.steps(settings("sgd", epochs=1))
    assert state.first > 0
    checkpoints.save(state, tmp_path / "here.pt")
    assert next(training.steps(settings("sgd"), tmp_path / "here.pt")).first == state.first


def test_the_seed_decides():
    assert list_losses(settings("adam", seed=1)) == list_losses(settings("adam", seed=1))
    assert list_losses(settings("adam", seed=1)) != list_losses(settings("adam", seed=2))


def test_initialising_leaves_the_global_random_state():
    before = torch.get_rng_state()
    training.start(settings("adam"))
    assert torch.equal(torch.get_rng_state(), before)


def test_divergence_ends_the_run_and_keeps_what_was_good():
    with pytest.raises(training.DivergedError, match=r"diverged at step \d+: the batch loss") as e:
        for _ in training.steps(settings("sgd", epochs=5, hyper={"lr": 100.0})):
            pass
    kept = e.value.parameters
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    model = DIGITS.model().to(torch.float32)
    model.load_state_dict(kept)
    data = DIGITS.data()
    assert torch.isfinite(DIGITS.loss(model(data.train_inputs), data.train_targets))


def test_a_run_that_diverges_keeps_its_records(tmp_path):
    with Progress(disable=True) as progress:
        outcome = runs.train(settings("sgd", epochs=5, hyper={"lr": 100.0}), tmp_path, progress)
    assert "diverged at step" in outcome.diverged
    assert not outcome.frame.empty
    assert records.read_header(outcome.folder)["status"].startswith("diverged: training diverged")
    kept = torch.load(outcome.folder / runs.LAST_FINITE, weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("share", [None, 0.9])
def test_a_last_step_that_destroys_the_model_is_noticed(tmp_path, epochs, share):
    """An epoch of one step: no further batch tells, nor is there anything to measure."""
    chosen = settings("sgd", epochs=epochs, batch_size=1500, hyper={"lr": 1e30})
    during = None if share is None else DuringTraining(share)
    with Progress(disable=True) as progress:
        outcome = runs.train(chosen, tmp_path, progress, during=during)
    assert "diverged at step 1: the training loss is" in outcome.diverged
    kept = torch.load(outcome.folder / runs.LAST_FINITE, weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    saved = torch.load(outcome.folder / runs.CHECKPOINT, weights_only=True)
    assert saved["step"] == 0
    assert list(outcome.frame["step"].unique()) == [0]


def test_a_run_killed_while_it_measures_has_its_checkpoint(tmp_path, monkeypatch):
    chosen = settings("adam", epochs=3)

    def killed(_, __, state, ___):
        if state.step == 20:
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(DuringTraining, "rows", killed)
    with Progress(disable=True) as progress:
        with pytest.raises(KeyboardInterrupt):
            runs.train(chosen, tmp_path, progress, during=DuringTraining(0.5))
        (folder,) = tmp_path.iterdir()
        assert torch.load(folder / runs.CHECKPOINT, weights_only=True)["step"] == 20
        outcome = runs.train(chosen, tmp_path, progress, resume=folder)
        whole = runs.train(chosen, tmp_path / "whole", progress)
    assert list(outcome.frame["step"]) == list(whole.frame["step"])
    assert list(outcome.frame["value"]) == list(whole.frame["value"])


@pytest.mark.parametrize("asked", [True, False])
def test_a_measuring_process_that_ends_with_the_run(tmp_path, monkeypatch, asked):
    """SIGTERM to the whole group ends the worker too; without one its end is an error."""

    def terminated(_, __, state, ___):
        if state.step == 10:
            if asked:
                os.kill(os.getpid(), signal.SIGTERM)
            raise TerminatedWorkerError("gone")
        return []

    monkeypatch.setattr(DuringTraining, "rows", terminated)
    with Progress(disable=True) as progress:
        if asked:
            outcome = runs.train(settings("adam"), tmp_path, progress, during=DuringTraining(0.5))
            assert outcome.stopped
            outcome = runs.train(settings("adam"), tmp_path, progress, resume=outcome.folder)
            assert list(outcome.frame["step"].unique()) == [0, 10, 20]
        else:
            with pytest.raises(TerminatedWorkerError, match="gone"):
                runs.train(settings("adam"), tmp_path, progress, during=DuringTraining(0.5))


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    chosen = settings("kbfgs", epochs=3)
    with Progress(disable=True) as progress:
        whole = runs.train(chosen, tmp_path / "whole", progress).frame
        first = runs.train(settings("kbfgs", epochs=1), tmp_path / "parts", progress)
        outcome = runs.train(chosen, tmp_path, progress, resume=first.folder)
    assert outcome.folder == first.folder
    assert list(outcome.frame["step"]) == list(whole["step"])
    assert list(outcome.frame["value"]) == list(whole["value"])
    assert outcome.frame["seconds"].is_monotonic_increasing
    assert records.read_header(outcome.folder)["status"] == "finished"


def test_a_run_killed_before_its_checkpoint_has_no_row_twice(tmp_path, monkeypatch):
    chosen, real = settings("adam", epochs=3), checkpoints.save

    def save(state, path):
        if state.step == 20:
            raise KeyboardInterrupt
        real(state, path)

    monkeypatch.setattr(checkpoints, "save", save)
    with Progress(disable=True) as progress:
        with pytest.raises(KeyboardInterrupt):
            runs.train(chosen, tmp_path, progress)
        monkeypatch.setattr(checkpoints, "save", real)
        (folder,) = tmp_path.iterdir()
        outcome = runs.train(chosen, tmp_path, progress, resume=folder)
    losses = outcome.frame[outcome.frame["metric"] == "train_loss"]
    assert list(losses["step"]) == [0, 10, 20, 30]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "was trained with seed 0, not 1: a run goes on with what it has"),
        ({"optimizer": "adam"}, "optimizer sgd, not adam"),
        ({"batch_size": 300}, "batch_size 0, not 300"),
        ({"lr": 0.5}, r"hyper {}, not {'lr': 0.5}"),
        ({"problem": "digits-autoencoder-small"}, "holds problem digits-autoencoder, not digits-"),
    ],
)
def test_a_run_goes_on_with_what_it_has(tmp_path, changes, said):
    with Progress(disable=True) as progress:
        first = runs.train(settings("sgd", epochs=1), tmp_path, progress).folder
        before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
        same = runs.settings(None, {"epochs": 2}, first)
        assert same == settings("sgd", epochs=2)
        problem = changes.pop("problem", None)
        with pytest.raises(ValueError, match=said):
            runs.train(runs.settings(problem, changes, first), tmp_path, progress, resume=first)
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before


def test_sigterm_ends_at_a_checkpoint_from_which_the_run_goes_on(tmp_path, monkeypatch):
    """In the middle of the second epoch, and bit for bit as if it had not been."""
    chosen, real = settings("kbfgs", epochs=3), training.steps
    before = signal.getsignal(signal.SIGTERM)

    def steps(*arguments):
        for state in real(*arguments):
            if state.step == 13 and "parts" in found:
                os.kill(os.getpid(), signal.SIGTERM)
            yield state

    found = {}
    monkeypatch.setattr(runs.training, "steps", steps)
    with Progress(disable=True) as progress:
        whole = runs.train(chosen, tmp_path / "whole", progress)
        found["parts"] = True
        first = runs.train(chosen, tmp_path / "parts", progress)
        status = records.read_header(first.folder)["status"]
        monkeypatch.setattr(runs.training, "steps", real)
        outcome = runs.train(chosen, tmp_path, progress, resume=first.folder)
    assert first.stopped
    assert not whole.stopped
    assert status == "stopped: by SIGTERM at step 13 of 30; --resume goes on"
    assert first.frame["step"].max() == 10
    assert torch.load(first.folder / runs.CHECKPOINT, weights_only=True)["step"] == 30
    assert list(outcome.frame["step"]) == list(whole.frame["step"])
    assert list(outcome.frame["value"]) == list(whole.frame["value"])
    assert records.read_header(outcome.folder)["status"] == "finished"
    assert signal.getsignal(signal.SIGTERM) is before


SCHEDULED = "cifar10-resnet32-small"


def test_the_learning_rate_follows_its_schedule(tmp_path):
    """After each epoch, also of a run that went on from the middle of one."""
    problem = problems.get(SCHEDULED)
    plan, lr = problem.schedule["sgd"], problem.optimizers["sgd"]["lr"]
    chosen = training.Settings(problem, "sgd", 4)
    rates, weights = {}, {}
    for state in training.steps(chosen):
        rates[state.step] = state.optimizer.param_groups[0]["lr"]
        weights = {n: t.clone() for n, t in state.model.state_dict().items()}
        if state.step == state.steps_per_epoch + 1:
            checkpoints.save(state, tmp_path / "middle.pt")
    each = state.steps_per_epoch
    assert rates == {step: pytest.approx(lr * plan.rate(step // each)) for step in rates}
    assert len(set(rates.values())) > 1
    *_, resumed = training.steps(chosen, resume=tmp_path / "middle.pt")
    assert all(torch.equal(t, weights[n]) for n, t in resumed.model.state_dict().items())


def test_evaluation_is_that_of_a_finished_model():
    """Batch norm by its running statistics, which evaluation does not move; modes as before."""
    state = training.start(training.Settings(problems.get(SCHEDULED), "sgd", 1))
    frozen = next(m for m in state.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    frozen.eval()
    before = {n: t.clone() for n, t in state.model.state_dict().items()}
    found = [
        training.evaluate(state, problems.get(SCHEDULED), chunk)["test_loss"] for chunk in (7, 50)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)  # of batches of any size
    assert all(torch.equal(t, before[n]) for n, t in state.model.state_dict().items())
    assert state.model.training
    assert not frozen.training

    def broken(*_):
        raise ValueError("no loss")

    with pytest.raises(ValueError, match="no loss"):
        training.evaluate(state, dataclasses.replace(problems.get(SCHEDULED), loss=broken))
    assert state.model.training


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"no problem 'digit'; known: \['cifar10-allcnn'"):
        problems.get("digit")
    with pytest.raises(ValueError, match=r"no optimizer 'kfca'; known: \['adam'"):
        training.start(settings("kfca"))
    with pytest.raises(ValueError, match="optimizer 'adam' does not take"):
        training.start(settings("adam", hyper={"damping": 1.0}))
    with pytest.raises(ValueError, match="batch size 9999 exceeds the 1500 examples"):
        training.start(settings("adam", batch_size=9999))
    with pytest.raises(ValueError, match="no checkpoint"):
        next(training.steps(settings("adam"), resume=tmp_path / "none.pt"))
    with pytest.raises(ValueError, match=f"no checkpoint.pt in {tmp_path}"):
        runs.settings_of(tmp_path)
    with pytest.raises(ValueError, match=r"name a problem to train; known: .*digits-auto"):
        runs.settings(None, {})


def test_every_problem_is_complete():
    assert len(problems.PROBLEMS) >= 34
    for name, problem in problems.PROBLEMS.items():
        assert problem.name == name
        if problem.partition:  # the paper's problems; few optimizers know their layers
            needed = {"adam", "sgd", "hessian_free", "block_hessian_free"}
        else:
            needed = set(optimizers.OPTIMIZERS) - set(optimizers.UNTUNED)
        assert needed <= set(problem.optimizers), name
        assert problem.summary
        assert math.isfinite(problem.measure_damping)


def test_autoencoders_have_a_narrow_code():
    found = {n: p for n, p in problems.PROBLEMS.items() if "autoencoder" in n}
    assert len(found) >= 12
    for problem in found.values():
        layers = [m for m in problem.model().modules() if isinstance(m, torch.nn.Linear)]
        code = min(layers, key=lambda layer: layer.out_features)
        assert code.out_features in (4, 6, 8, 30)
