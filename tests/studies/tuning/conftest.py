"""Searches in this process or in workers, and a look into their studies."""

import sqlite3
from contextlib import closing

import pytest
import torch
from rich.progress import Progress

from kronscope.studies.tuning import run as tuning


class Searching:
    """Runs searches and reads what they left."""

    @staticmethod
    def run(search, results, resume=None):
        with Progress(disable=True) as progress:
            return tuning.run(search, results, progress, resume)

    @staticmethod
    def found(search, folder):
        return tuning.open_study(search, folder).get_trials()

    @staticmethod
    def finished(trials):
        return {t.number: t.datetime_complete for t in trials if t.state.is_finished()}

    @staticmethod
    def age_heartbeats(folder):
        """As if the heartbeats of running trials had been missing for an hour."""
        with closing(sqlite3.connect(folder / tuning.DATABASE, timeout=60)) as database, database:
            database.execute("update trial_heartbeats set heartbeat = datetime('now', '-1 hour')")


@pytest.fixture(scope="session")
def searching():
    return Searching


@pytest.fixture
def in_this_process(monkeypatch):
    """Trainings one after the other in this process."""
    each = staticmethod(lambda work, jobs, _: ((job, work(*job)) for job in jobs))
    monkeypatch.setattr(tuning, "results_of", each)


@pytest.fixture
def in_float32():  # the initialisation draws in the default dtype
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(threads)
