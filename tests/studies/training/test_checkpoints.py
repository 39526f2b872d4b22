"""Checkpoints: what is damaged, no checkpoint or another's is refused by name, never half read."""

import dataclasses

import pytest
import torch

from kronscope.studies import problems
from kronscope.studies.measuring.table import blocks_table
from kronscope.studies.training import checkpoints
from kronscope.studies.training import loop as training

DIGITS = problems.get("digits-autoencoder-small")
SETTINGS = training.Settings(DIGITS, "adam", epochs=2)


@pytest.fixture
def path(tmp_path):
    """A good checkpoint, after an epoch."""
    for state in training.steps(SETTINGS):
        if state.step == state.steps_per_epoch:
            checkpoints.save(state, tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt"


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def change_a_weight(path):
    """A byte in the middle of a tensor: torch.load does not notice."""
    weight = torch.load(path, weights_only=True)["model"]["0.weight"]
    content, at = path.read_bytes(), weight.numpy().tobytes()
    place = content.index(at) + len(at) // 2
    path.write_bytes(content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :])
    changed = torch.load(path, weights_only=True)["model"]["0.weight"]
    assert not torch.equal(changed, weight)


def without_the_optimizer(path):
    content = torch.load(path, weights_only=True)
    del content["optimizer"]
    torch.save(content, path)


DAMAGE = {
    "missing": (lambda p: p.unlink(), "no checkpoint .*; `kronscope train` writes one after each"),
    "empty": (lambda p: cut(p, 0), "cannot be read"),
    "cut off": (lambda p: cut(p, 3000), "cannot be read"),
    "a byte less": (lambda p: cut(p, -1), "cannot be read"),
    "a changed weight": (change_a_weight, "does not fit its checksum"),
    "text": (lambda p: p.write_text("not a checkpoint" * 100), "cannot be read"),
    "a list": (lambda p: torch.save([1, 2], p), "holds a list without model, optimizer, averaged"),
    "a tensor": (lambda p: torch.save(torch.zeros(3), p), "holds a Tensor without model, optim"),
    "a number": (lambda p: torch.save(3, p), "holds a int without model"),
    "parameters": (
        lambda p: checkpoints.save_parameters(DIGITS.model().state_dict(), p),
        "holds a OrderedDict without averaged, first, model, optimizer",
    ),
    "a part less": (without_the_optimizer, "holds a dict without optimizer"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_no_good_checkpoint_is_named(path, damage, said):
    damage(path)
    for read in (
        lambda: next(training.steps(SETTINGS, resume=path)),
        lambda: blocks_table(DIGITS.name, "0", "ggn", 8, path, 0),
    ):
        with pytest.raises(ValueError, match=said) as error:
            read()
        assert str(path) in str(error.value)
        if path.exists():
            assert "expected a checkpoint that `kronscope train` wrote" in str(error.value)
            assert "or train anew without --resume" in str(error.value)


OTHERS = {
    "another problem of the same shape": dataclasses.replace(
        SETTINGS, problem=dataclasses.replace(DIGITS, name="digits-of-another")
    ),
    "another problem": dataclasses.replace(SETTINGS, problem=problems.get("digits-autoencoder")),
    "another optimizer": dataclasses.replace(SETTINGS, optimizer="sgd"),
    "a variant of it": dataclasses.replace(SETTINGS, optimizer="kbfgs"),
}


@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
def test_a_checkpoint_of_another_problem_or_optimizer_is_refused(path, settings):
    said = (
        rf"checkpoint\.pt is no checkpoint of {settings.problem.name} and {settings.optimizer}: "
        r"digits-autoencoder-small and adam; name the problem and optimizer that it is of, or"
    )
    with pytest.raises(ValueError, match=said):
        next(training.steps(settings, resume=path))


def test_a_checkpoint_of_another_problem_is_not_measured(path):
    with pytest.raises(ValueError, match="of digits-autoencoder: digits-autoencoder-small; name"):
        blocks_table("digits-autoencoder", "0", "ggn", 8, path, 0)


@pytest.mark.parametrize("part", ["model", "optimizer", "step"])
def test_parts_of_another_form_are_refused(path, part):
    content = torch.load(path, weights_only=True)
    torch.save(content | {part: [1, 2]}, path)
    with pytest.raises(ValueError, match=r"is no checkpoint of digits-autoencoder-small and adam"):
        next(training.steps(SETTINGS, resume=path))


def test_checkpoints_without_names_are_taken_as_before(path):
    content = torch.load(path, weights_only=True)
    del content["of"]
    torch.save(content, path)
    assert next(training.steps(SETTINGS, resume=path)).step == 10


def test_a_checkpoint_is_written_whole_or_not_at_all(path, monkeypatch):
    before = path.read_bytes()

    def interrupted(_, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(training.start(SETTINGS), path)
    assert path.read_bytes() == before
