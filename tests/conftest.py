"""A real, tiny run of the demo's study, shared by all tests that read results."""

import dataclasses

import pytest
import torch
from rich.progress import Progress

from kronscope.studies.experiments import error_along_training
from kronscope.studies.reports.report import write_report
from tests.pools import FOUR_LAYERS, in_process


@pytest.fixture(autouse=True)
def threads():
    """Leave the number of threads: with another, sums differ in their last digits."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def demo_results(tmp_path_factory):
    """Results folder as of `kronscope demo --tiny --no-dashboard`, on a smaller network."""
    folder = tmp_path_factory.mktemp("demo")
    grid = dataclasses.replace(error_along_training.TINY, problem=FOUR_LAYERS.name)
    with in_process(), torch.random.fork_rng(), Progress(disable=True) as progress:
        run = error_along_training.run(grid, folder, progress)
    write_report(run)
    return folder


@pytest.fixture(scope="session")
def demo_run(demo_results):
    """The run's own folder."""
    (run,) = demo_results.iterdir()
    return run
