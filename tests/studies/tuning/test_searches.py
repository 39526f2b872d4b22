"""What is searched and which trainings are stopped: what a problem lists; judged after a kill."""

import dataclasses

import numpy as np
import optuna
import pytest

from kronscope.studies import problems
from kronscope.studies.results import records
from kronscope.studies.training import trials
from kronscope.studies.tuning import run as tuning
from kronscope.studies.tuning.searches import Grid, Halving, Listed

SMALL = "digits-autoencoder-small"
HALVING = Halving(SMALL, "adam", epochs=4, trials=6)


def test_a_clipped_optimizer_draws_its_clip():
    search = Halving(SMALL, "eva", lr_factors=(0.1, 10.0), damping_factors=(1.0, 1.0), trials=5)
    for point in search.points():
        assert set(point) == {"kl_clip", "damping"}
        assert 1e-4 <= point["kl_clip"] <= 1.0
        assert point["damping"] == 0.03
        assert dict(search.trial(point).settings)["lr"] == 0.1


def test_points_are_spread_over_the_logarithm():
    """One in each eighth of the range, as a Sobol sequence has but for its first, random point."""
    search = Halving(SMALL, "adam", lr_factors=(1e-4, 1e4), trials=9)
    place = np.log10([point["lr"] for point in search.points()[1:]])
    low, high = np.log10(search.searched.grid["lr"])
    assert sorted(((place - low) / (high - low) * 8).astype(int)) == list(range(8))


LOSSES = dict(zip("abcdef", (5.0, 4.0, 1.0, 2.0, 1.5, 1.2), strict=True))  # of the points


def epochs_of_known_losses(search, killed, error):
    """A training whose loss never changes, given by its point's place; those killed die once."""
    by_lr = dict(zip((p["lr"] for p in search.points()), LOSSES.items(), strict=True))

    def epochs(trial):
        name, loss = by_lr[dict(trial.settings)["lr"]]
        for epoch in range(search.epochs + 1):
            if epoch == 2 and name in killed:
                killed.remove(name)
                raise error
            yield [{"step": epoch, "epoch": epoch, "seconds": 0.0}
                   | {"metric": "train_loss", "value": loss}]  # fmt: skip

    return epochs


@pytest.mark.parametrize("killed", ["", "c"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])  # the second stays RUNNING
def test_a_killed_search_judges_as_one_that_was_not(
    searching, tmp_path, monkeypatch, killed, error
):
    """The third point is killed after the first rung, and trained again."""
    monkeypatch.setattr(trials, "epochs", epochs_of_known_losses(HALVING, list(killed), error))
    for search in (dataclasses.replace(HALVING, trials=3), HALVING):
        study = tuning.open_study(search, tmp_path)
        tuning.enqueue(study, search.points())
        while "WAITING" in [trial.state.name for trial in study.get_trials()]:
            try:
                tuning.work(search, tmp_path)
            except error:
                searching.age_heartbeats(tmp_path)
                tuning.enqueue(study, search.points())
    found = searching.found(HALVING, tmp_path)
    assert len(found) == 6 + len(killed)
    ended = {t.params["lr"]: t.last_step for t in found if t.state.name != "FAIL"}
    # of six the last is second and goes on; after three epochs it is second of four
    assert [ended[point["lr"]] for point in HALVING.points()] == [4, 4, 4, 1, 1, 3]


def stops(search, loss, others, changes=0):
    """Epoch after which a training is stopped beside others, of constant loss; 0: it is not.

    Its loss is below all others before the epoch `changes`.
    """
    study = optuna.create_study(pruner=search.pruner())
    for known in (*others, loss):
        trial, found = study.ask(), 0
        for epoch in range(1, search.epochs + 1):
            trial.report(known if known != loss or epoch >= changes else -1.0, epoch)
            found = found or (epoch if trial.should_prune() else 0)
        study.tell(trial, known)
    return found


def test_the_best_third_goes_on():
    search = Halving(SMALL, "adam", epochs=54)
    assert {stops(search, 1.0, [0.5], changes=epoch) for epoch in range(1, 55)} == {2, 6, 18, 54}
    search = Halving(SMALL, "adam", epochs=1)
    assert not stops(search, 9.0, [])
    assert not stops(search, 1.0, [2.0, 3.0, 4.0, 5.0])
    assert stops(search, 2.0, [1.0, 3.0, 4.0, 5.0])
    assert not stops(search, 2.0, [1.0, 3.0, 4.0, 5.0, np.inf])
    assert stops(search, np.inf, [1.0])
    assert not stops(Grid(SMALL, epochs=1), np.inf, [1.0])


LISTED = Listed("mnist-autoencoder-small", "adam", epochs=1)


def test_what_the_papers_tuned_is_searched():
    """Adam's ε beside its rate, rates and weight decays of convolutional networks."""
    grid = problems.get(LISTED.problem).searched["adam"].grid
    points = LISTED.points()
    assert LISTED.searched.grid == grid
    assert set(grid) == {"lr", "eps"}
    assert len(points) == len(grid["lr"]) * len(grid["eps"]) == 21
    assert dict(LISTED.trial(points[-1]).settings) == {"lr": 0.01, "eps": 0.01}
    assert LISTED.label(points[0]) == "adam lr 1e-05, ε 1e-08"
    assert len({LISTED.label(point) for point in points}) == 21
    network = Listed("cifar10-resnet32", "tnt")
    assert {"lr": 1e-4, "weight_decay": 10.0} in network.points()
    assert network.searched.source.startswith("recalled: of TNT the names")


def test_the_papers_grid_is_found_best_and_gone_on_with(searching, tmp_path, monkeypatch):
    """Stopped after four points; the others follow, and none of the four again."""
    few = {"lr": (1e-3, 0.01, 0.03), "eps": (1e-8, 1e-4)}
    own = problems.get(LISTED.problem)
    searched = {"adam": dataclasses.replace(own.searched["adam"], grid=few)}
    monkeypatch.setitem(problems.PROBLEMS, own.name, dataclasses.replace(own, searched=searched))
    left = [1] * 4

    def results_of(work, jobs, _):
        for job in jobs:
            if not left:
                raise KeyboardInterrupt
            left.pop()
            yield work(*job)

    monkeypatch.setattr(tuning, "results_of", results_of)
    with pytest.raises(KeyboardInterrupt):
        searching.run(LISTED, tmp_path)
    (folder,) = tmp_path.iterdir()
    before = searching.found(LISTED, folder)
    assert [t.state.name for t in before] == ["COMPLETE"] * 4 + ["WAITING"] * 2
    left += [1] * 2
    assert searching.run(LISTED, tmp_path, folder) == folder
    ended = searching.found(LISTED, folder)
    assert [t.state.name for t in ended] == ["COMPLETE"] * 6
    assert ended[:4] == before[:4]
    best, header = min(ended, key=lambda t: t.value), records.read_header(folder)
    assert header["best"] == best.params
    assert {"eps", "lr"} == set(header["best"])
    assert "recalled: of TNT the names" in header["comparison"]["caption"]
    assert all("ε" in row[0] for row in header["comparison"]["rows"])
    with pytest.raises(ValueError, match="has epochs 1, not 2"):
        searching.run(dataclasses.replace(LISTED, epochs=2), tmp_path, folder)


def test_where_nothing_is_listed_the_optimizers_that_have_it_are_named(searching, tmp_path):
    with pytest.raises(ValueError, match=r"-tanh lists nothing searched of 'kfac'; .* \['adam', "):
        searching.run(Listed("mnist-autoencoder-tanh", "kfac"), tmp_path)
    assert not list(tmp_path.iterdir())
