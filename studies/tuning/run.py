"""Run a search as an Optuna study in SQLite, shared by worker processes of any number of commands.

    results/<run>/optuna.db   the study; `optuna-dashboard sqlite:///optuna.db` shows it
    results/<run>/records/    losses after every epoch of each training

All points are enqueued before the first training, so that which are searched depends neither on
the number of workers nor on kills. A trial becomes COMPLETE with its last training loss, inf if it
diverged, for that is a result; PRUNED if it was stopped early; FAIL if it was interrupted or its
process died, so that its heartbeat is missing for GRACE seconds: then its point is enqueued again.
"""

import dataclasses
import math
import time
import warnings
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path

import optuna
import sqlalchemy
from loky.process_executor import TerminatedWorkerError
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState
from rich.progress import Progress

from ..results import options, records
from ..results.runs import running
from ..training import trials
from ..training.workers import results_of
from .searches import Search
from .table import table

QUESTION = "Which hyper-parameters train best?"
DATABASE = "optuna.db"
EARLIER = "tune"  # name of the studies whose running trials had no heartbeat
HEARTBEAT, GRACE = 10, 60  # seconds
DEATHS = 3  # of worker processes in one search: then it is not bad luck, but memory
PATIENCE = 60.0  # seconds that a worker waits for the database while others write
POLL = 0.5  # seconds between looks at trainings of other commands
optuna.logging.set_verbosity(optuna.logging.ERROR)


class SurplusError(RuntimeError):
    """A trial has no point, or that of an earlier trial."""


def run(search: Search, results: Path, progress: Progress, resume: Path | None = None) -> Path:
    """Search and return the run's folder; header["best"] holds the best settings, all of them.

    resume: folder of a search of the same kind, killed, finished or under way in another process;
    its points and the new ones of `search` are trained.
    Raises: ValueError for an unknown problem or optimizer, a folder of another search or of an
    earlier version, and as `options.options`; TerminatedWorkerError if processes keep dying.
    """
    options.options(vars(search))
    search, points = dataclasses.replace(search, epochs=search.budget), search.points()
    if resume:
        _refuse_earlier_version(resume)
    config = dataclasses.asdict(search)
    with running(search.NAME, config, QUESTION, results, resume, search.FIXED) as (folder, header):
        header["versions"]["optuna"] = optuna.__version__
        place = folder.resolve()  # the workers may have started elsewhere
        _complete(search, place, points, progress)
        header |= table(open_study(search, place).get_trials(), search, records.read(folder))
    return folder


def _refuse_earlier_version(folder: Path) -> None:
    database = folder / DATABASE
    if database.is_file() and EARLIER in optuna.get_all_study_names(f"sqlite:///{database}"):
        raise ValueError(
            f"{folder} holds a search of an earlier version of kronscope, which cannot be gone on "
            "with; start it again without --resume (its records and report stay readable)"
        )


def open_study(search: Search, folder: Path) -> optuna.Study:
    """The study in the folder, a new one if there is none."""
    sampler = optuna.samplers.RandomSampler()  # never asked: all points are enqueued
    return optuna.create_study(
        storage=_storage(folder),
        sampler=sampler,
        pruner=search.pruner(),
        study_name=search.NAME,
        load_if_exists=True,
    )


@lru_cache(maxsize=1)  # opening takes longer than an epoch of a small problem
def _storage(folder: Path) -> optuna.storages.RDBStorage:
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{folder / DATABASE}",
            {"connect_args": {"timeout": PATIENCE}},
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
        )

    # SQLite has no SELECT ... FOR UPDATE: two workers would now and then take the same trial
    @sqlalchemy.event.listens_for(storage.engine, "begin")
    def _(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return storage


def _complete(
    search: Search, folder: Path, points: list[dict[str, float]], progress: Progress
) -> None:
    """Train until no point waits or runs, whoever trains it."""
    study, task, deaths = open_study(search, folder), progress.add_task("tuning", total=None), 0
    while True:
        enqueue(study, points)
        states = Counter(trial.state.name for trial in study.get_trials(deepcopy=False))
        done, waiting = states["COMPLETE"] + states["PRUNED"], states["WAITING"]
        progress.update(task, total=done + waiting + states["RUNNING"], completed=done)
        if not waiting and not states["RUNNING"]:
            return
        if not waiting:
            time.sleep(POLL)
        try:
            for _ in results_of(work, [(search, folder)] * waiting, search.workers):
                progress.advance(task)
        except TerminatedWorkerError:
            deaths += 1
            if deaths == DEATHS:
                raise


def enqueue(study: optuna.Study, points: list[dict[str, float]]) -> None:
    """Enqueue the points that are new, and those again whose trials failed."""
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        optuna.storages.fail_stale_trials(study)
    known = study.get_trials(deepcopy=False)
    alive = [point_of(trial) for trial in known if trial.state != TrialState.FAIL]
    for point in [*map(point_of, known), *points]:
        if point and point not in alive:
            study.enqueue_trial(point)
            alive.append(point)


def point_of(trial: FrozenTrial) -> dict[str, float]:
    """The point {setting: value} of a trial, also of one that waits; {} if it has none."""
    return trial.system_attrs.get("fixed_params", {}) | trial.params


def work(search: Search, folder: Path) -> None:
    """Train the next point that waits, if there is one."""
    study = open_study(search, folder)
    if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        return
    try:
        study.optimize(partial(train, search, folder), n_trials=1, catch=(SurplusError,))
    except (ValueError, AssertionError) as error:
        # its heartbeat was missed, perhaps while the machine slept: others retry the trial
        if "Cannot tell a FAIL trial." not in (str(error), str(error.__context__)):
            raise


def train(search: Search, folder: Path, trial: optuna.Trial) -> float:
    """Objective: the training loss at the trial's point, inf where the training diverges.

    The losses go into the records and to the study after every epoch; the trial's attribute "ended"
    says why a training diverged. Raises: TrialPruned, SurplusError.
    """
    point = _suggested(search, trial)
    own, label, rows, epoch = search.trial(point), search.label(point), [], 0
    try:
        for losses in trials.epochs(own):
            rows += trials.as_records(folder, own, search.NAME, label, losses)
            records.put(folder, own.name, rows)
            epoch = round(losses[0]["epoch"])
            loss = next(row["value"] for row in losses if row["metric"] == "train_loss")
            if not math.isfinite(loss):
                why = f"the training loss is {loss} after {epoch} epochs"
                raise trials.EndedError(why, losses[0]["step"])
            if epoch:
                trial.report(loss, epoch)
            if 0 < epoch < own.epochs and trial.should_prune():
                raise optuna.TrialPruned
    except trials.EndedError as error:
        trial.set_user_attr("ended", str(error))
        trial.report(math.inf, epoch + 1)
        trial.should_prune()  # enters it at its rung, for the others to be compared with
        return math.inf
    return loss


def _suggested(search: Search, trial: optuna.Trial) -> dict[str, float]:
    """The point of a trial, suggested to it.

    Raises: SurplusError where another worker has taken the last waiting trial since `work` saw it,
    or another command has enqueued the same point at the same time.
    """
    earlier = trial.study.get_trials(deepcopy=False)[: trial.number + 1]
    point = point_of(earlier.pop())
    if not point or point in [point_of(t) for t in earlier if t.state != TrialState.FAIL]:
        raise SurplusError(f"trial {trial.number} has the point {point}")
    for name, value in point.items():
        values = (*search.searched.grid[name], value)  # those of an earlier search may lie outside
        trial.suggest_float(name, min(values), max(values), log=True)
    return point
