"""Which learning rate and damping train best? Searches by training loss, through Optuna.

`searches.Grid` trains every point of a grid to the end, `searches.Listed` those of the grid that
the problem lists as searched; `searches.Halving` draws points and stops the worse early.

    results/<run>/optuna.db   the study in SQLite: which points wait, run or are finished
    results/<run>/locks/      one per training under way; the system frees it if the process dies
    results/<run>/records/    losses after every epoch of each point

All points are known beforehand and queue in the study, so that what is searched depends neither on
the number of workers nor on how often the search was killed. Workers, also those of a second
command on the same folder, each take the next one; a point whose process died queues again.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from concurrent.futures import as_completed
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from loky.process_executor import TerminatedWorkerError
from rich.progress import Progress

from ..results import options, records
from ..results.runs import running
from ..training import trials
from ..training.workers import shared_pool
from .searches import Search, load_optuna
from .table import table

if TYPE_CHECKING:
    import optuna
    from filelock import BaseFileLock

DATABASE, LOCKS, STUDY = "optuna.db", "locks", "tune"
DEATHS = 3  # of worker processes in one search: then it is not bad luck, but memory
PATIENCE = 60.0  # seconds that a worker waits for the database while others write
POLL = 0.5  # seconds between looks at trainings of another command


def run(search: Search, results: Path, progress: Progress, resume: Path | None = None) -> Path:
    """Search and return the run's folder; header["best"] holds the best settings, all of them.

    resume: the folder of an earlier search of the same kind, which then goes on with what it has
    queued and with the points that are new in `search`. A training that diverges, or whose factors
    cannot be inverted, counts as infinitely bad.
    Raises: ValueError for an unknown problem or optimizer, a folder of another search, where
    Optuna is not installed, and as `options.options`.
    """
    version = load_optuna().__version__
    options.options(vars(search))
    lists = {name: tuple(own) for name, own in vars(search).items() if isinstance(own, list)}
    search = dataclasses.replace(search, **{**lists, "epochs": search.budget})  # type: ignore[arg-type]
    points, question = search.points(), (__doc__ or "").partition("\n")[0]
    config = dataclasses.asdict(search)
    with running(search.NAME, config, question, results, resume, search.FIXED) as (folder, header):
        header["versions"]["optuna"] = version
        place = folder.resolve()  # the workers may have started elsewhere
        study = _open(place)
        _complete(search, place, study, points, progress)
        header |= table(study.get_trials(), search, records.read(folder))
    return folder


@lru_cache(maxsize=1)  # opening takes longer than an epoch of a small problem
def _open(folder: Path) -> "optuna.Study":
    """The study in the folder, a new one if there is none."""
    optuna = load_optuna()
    with _claims(folder):  # two that make the tables at once get in each other's way
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{(folder / DATABASE).resolve()}",
            engine_kwargs={"connect_args": {"timeout": PATIENCE}},
        )
        return optuna.create_study(
            storage=storage,
            study_name=STUDY,
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(),  # never asked: all points are given
            pruner=optuna.pruners.NopPruner(),  # nor this: `Search.stops` is
        )


def _lock(folder: Path, name: str) -> "BaseFileLock":
    from filelock import FileLock

    (folder / LOCKS).mkdir(exist_ok=True)
    return FileLock(folder / LOCKS / f"{name}.lock")


def _claims(folder: Path) -> "BaseFileLock":
    """Held while what runs is compared with the locks, or changed together with them."""
    return _lock(folder, "claims")


def _is_held(lock: "BaseFileLock") -> bool:
    from filelock import Timeout

    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True


def _count(study: "optuna.Study", *states: str) -> int:
    return sum(trial.state.name in states for trial in study.get_trials(deepcopy=False))


def _complete(
    search: Search,
    folder: Path,
    study: "optuna.Study",
    points: list[dict[str, float]],
    progress: Progress,
) -> None:
    """Train until no point waits or runs, whoever trains it.

    Raises: TerminatedWorkerError if processes keep dying.
    """
    task, deaths = progress.add_task("tuning", total=None), 0
    while True:
        _queue(search, folder, study, points)
        waiting, under_way = _count(study, "WAITING"), _count(study, "RUNNING")
        done = _count(study, "COMPLETE", "PRUNED")
        progress.update(task, total=waiting + under_way + done, completed=done)
        if not waiting and not under_way:
            return
        if not waiting:
            time.sleep(POLL)
        try:
            for _ in _work_off(search, folder, waiting):
                progress.update(task, completed=_count(study, "COMPLETE", "PRUNED"))
        except TerminatedWorkerError:
            deaths += 1
            if deaths == DEATHS:
                raise


def _queue(
    search: Search, folder: Path, study: "optuna.Study", points: list[dict[str, float]]
) -> None:
    """Queue the points that are new, and those again whose process died."""
    optuna = load_optuna()
    states, create = optuna.trial.TrialState, optuna.trial.create_trial
    ranges = {
        name: optuna.distributions.FloatDistribution(min(values), max(values), log=True)
        for name, values in search.axes().items()
    }
    with _claims(folder):
        for trial in study.get_trials(states=(states.RUNNING,)):
            if not _is_held(_lock(folder, str(trial.number))):
                study.tell(trial.number, state=states.FAIL)
        known = study.get_trials()
        alive = [trial.params for trial in known if trial.state != states.FAIL]
        wanted = [(trial.params, trial.distributions) for trial in known]
        for params, found in [*wanted, *((point, ranges) for point in points)]:
            if params not in alive:
                study.add_trial(create(state=states.WAITING, params=params, distributions=found))
                alive.append(params)


def _work_off(search: Search, folder: Path, count: int) -> Iterator[None]:
    """Have `count` points trained, `search.workers` at once; yields as each has ended."""
    pool = shared_pool(search.workers)
    pending = [pool.submit(work, search, folder) for _ in range(count)]
    try:
        for future in as_completed(pending):
            future.result()
            yield
    finally:
        for future in pending:  # nobody waits for these after an error
            future.cancel()


def work(search: Search, folder: Path) -> int | None:
    """Train the next point of the queue; returns its trial's number, None if none was waiting."""
    study = _open(folder)
    with _claims(folder):
        if not _count(study, "WAITING"):
            return None
        trial = study.ask()
        lock = _lock(folder, str(trial.number))
        lock.acquire()
    try:
        train(search, folder, study, trial)
    finally:
        lock.release()
    return trial.number


def train(search: Search, folder: Path, study: "optuna.Study", trial: "optuna.Trial") -> None:
    """Train a point; its losses go into the records and to the study after every epoch.

    The trial's attribute "ended" says why it has no finite loss.
    """
    states = load_optuna().trial.TrialState
    point, rows, epoch, loss = search.trial(trial.params), [], 0, math.inf
    label = search.label(trial.params)
    try:
        for losses in trials.epochs(point):
            rows += trials.as_records(folder, point, search.NAME, label, losses)
            records.put(folder, point.name, rows)
            epoch = round(losses[0]["epoch"])
            loss = next(row["value"] for row in losses if row["metric"] == "train_loss")
            if not math.isfinite(loss):
                why = f"the training loss is {loss} after {epoch} epochs"
                raise trials.EndedError(why, losses[0]["step"])
            if epoch:
                trial.report(loss, epoch)
            if 0 < epoch < point.epochs and _stops(search, study, trial, epoch, loss):
                study.tell(trial, state=states.PRUNED)
                return
    except trials.EndedError as error:
        trial.set_user_attr("ended", str(error))
        loss = math.inf
        trial.report(loss, epoch + 1)  # for the others to be compared with it
    study.tell(trial, loss)


def _stops(
    search: Search, study: "optuna.Study", trial: "optuna.Trial", epoch: int, loss: float
) -> bool:
    """By the losses of others, but for trainings that were killed: their points queue again."""
    found = study.get_trials(deepcopy=False)
    known = (t for t in found if t.state.name != "FAIL" and t.number != trial.number)
    others = [t.intermediate_values[epoch] for t in known if epoch in t.intermediate_values]
    return search.stops(epoch, loss, others)
