"""What is searched and which trainings are stopped: what a problem lists; judged after a kill."""

import dataclasses

import numpy as np
import optuna
import pytest
from rich.progress import Progress

from kronscope.studies import problems
from kronscope.studies.results import records
from kronscope.studies.training import trials
from kronscope.studies.tuning import queue as tuning
from kronscope.studies.tuning.searches import Grid, Halving, Listed

SMALL = "digits-autoencoder-small"
HALVING = Halving(SMALL, "adam", epochs=4, trials=6)


def run(search, results, resume=None):
    with Progress(disable=True) as progress:
        return tuning.run(search, results, progress, resume)


def found(folder):
    storage = f"sqlite:///{folder / tuning.DATABASE}"
    return optuna.load_study(study_name=tuning.STUDY, storage=storage).get_trials()


LOSSES = dict(zip("abcdef", (5.0, 4.0, 1.0, 2.0, 1.5, 1.2), strict=True))  # of the points


def epochs_of_known_losses(search, killed):
    """A training whose loss never changes, given by its point's place; those killed die once."""
    by_lr = dict(zip((p["lr"] for p in search.points()), LOSSES.items(), strict=True))

    def epochs(trial):
        name, loss = by_lr[dict(trial.settings)["lr"]]
        for epoch in range(search.epochs + 1):
            if epoch == 2 and name in killed:
                killed.remove(name)
                raise KeyboardInterrupt
            yield [{"step": epoch, "epoch": epoch, "seconds": 0.0}
                   | {"metric": "train_loss", "value": loss}]  # fmt: skip

    return epochs


@pytest.mark.parametrize("killed", ["", "c"])
def test_a_killed_search_judges_as_one_that_was_not(tmp_path, monkeypatch, killed):
    """The third point is killed after the first look, and looked at again when it is trained."""
    whole = dataclasses.replace(HALVING, workers=1)
    monkeypatch.setattr(trials, "epochs", epochs_of_known_losses(whole, list(killed)))
    for search in (dataclasses.replace(whole, trials=3), whole):
        study = tuning._open(tmp_path)
        tuning._queue(search, tmp_path, study, search.points())
        while tuning._count(study, "WAITING"):
            try:
                tuning.work(search, tmp_path)
            except KeyboardInterrupt:
                tuning._queue(search, tmp_path, study, search.points())
    assert len(found(tmp_path)) == 6 + len(killed)
    ended = {t.params["lr"]: t.last_step for t in found(tmp_path) if t.state.name != "FAIL"}
    # of six the last is second and goes on; after three epochs it is second of four
    assert [ended[point["lr"]] for point in whole.points()] == [4, 4, 4, 1, 1, 3]


def test_the_best_third_goes_on():
    looks = [Halving(SMALL, "adam", epochs=54).stops(epoch, 1.0, [0.5]) for epoch in range(55)]
    assert [epoch for epoch, look in enumerate(looks) if look] == [2, 6, 18, 54]
    search = Halving(SMALL, "adam", epochs=27)
    assert not search.stops(1, 9.0, [])
    assert not search.stops(1, 1.0, [2.0, 3.0, 4.0, 5.0])
    assert search.stops(1, 2.0, [1.0, 3.0, 4.0, 5.0])
    assert not search.stops(1, 2.0, [1.0, 3.0, 4.0, 5.0, np.inf])
    assert search.stops(1, np.inf, [1.0])
    assert not Grid(SMALL).stops(1, np.inf, [1.0])


LISTED = Listed("mnist-autoencoder-small", "adam", epochs=1)


def test_what_the_papers_tuned_is_searched():
    """Adam's ε beside its rate, rates and weight decays of convolutional networks."""
    grid = problems.get(LISTED.problem).searched["adam"].grid
    points = LISTED.points()
    assert LISTED.axes() == dict(grid)
    assert set(grid) == {"lr", "eps"}
    assert len(points) == len(grid["lr"]) * len(grid["eps"]) == 21
    assert dict(LISTED.trial(points[-1]).settings) == {"lr": 0.01, "eps": 0.01}
    assert LISTED.label(points[0]) == "adam lr 1e-05, ε 1e-08"
    assert len({LISTED.label(point) for point in points}) == 21
    network = Listed("cifar10-resnet32", "tnt")
    assert {"lr": 1e-4, "weight_decay": 10.0} in network.points()
    assert network.source.startswith("recalled: of TNT the names")


def test_the_papers_grid_is_found_best_and_gone_on_with(tmp_path, monkeypatch):
    """Stopped after four points; the others follow, and none of the four again."""
    few = {"lr": (1e-3, 0.01, 0.03), "eps": (1e-8, 1e-4)}
    own = problems.get(LISTED.problem)
    searched = {"adam": dataclasses.replace(own.searched["adam"], grid=few)}
    monkeypatch.setitem(problems.PROBLEMS, own.name, dataclasses.replace(own, searched=searched))
    search = dataclasses.replace(LISTED, workers=1)
    left = [1] * 4

    def work_off(search, folder, count):
        for _ in range(count):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            yield tuning.work(search, folder)

    monkeypatch.setattr(tuning, "_work_off", work_off)
    with pytest.raises(KeyboardInterrupt):
        run(search, tmp_path)
    (folder,) = tmp_path.iterdir()
    before = {t.number: t.datetime_complete for t in found(folder) if t.state.is_finished()}
    assert len(before) == 4
    left += [1] * 2
    assert run(search, tmp_path, folder) == folder
    ended = found(folder)
    assert [t.state.name for t in ended] == ["COMPLETE"] * 6
    assert {t.number: t.datetime_complete for t in ended if t.number in before} == before
    best, header = min(ended, key=lambda t: t.value), records.read_header(folder)
    assert header["best"] == best.params
    assert {"eps", "lr"} == set(header["best"])
    assert "recalled: of TNT the names" in header["comparison"]["caption"]
    assert all("ε" in row[0] for row in header["comparison"]["rows"])
    with pytest.raises(ValueError, match="has epochs 1, not 2"):
        run(dataclasses.replace(search, epochs=2), tmp_path, folder)


def test_where_nothing_is_listed_the_optimizers_that_have_it_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"-tanh lists nothing searched of 'kfac'; .* \['adam', "):
        run(Listed("mnist-autoencoder-tanh", "kfac"), tmp_path)
    assert not list(tmp_path.iterdir())
