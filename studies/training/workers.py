"""Worker processes shared by studies and searches."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, as_completed
from typing import Any, TypeVar

from loky import get_reusable_executor

# PyTorch asks for large pages: fresh memory costs more than the arithmetic on it otherwise
LARGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
IDLE = 3600.0  # seconds; one that gives up earlier may do so while it is being given work

Job = TypeVar("Job", bound=tuple[Any, ...])
Result = TypeVar("Result")


def shared_pool(workers: int) -> Executor:
    """`workers` processes, those of the last call where they are still there."""
    return get_reusable_executor(max_workers=workers, timeout=IDLE, env=LARGE_PAGES)


def results_of(
    function: Callable[..., Result], jobs: Iterable[Job], workers: int
) -> Iterator[tuple[Job, Result]]:
    """Call function(*job) for each job in worker processes; yields (job, result) as each ends.

    An error of a job is raised here; jobs that have not begun are then cancelled.
    """
    pool = shared_pool(workers)
    pending = {pool.submit(function, *job): job for job in jobs}
    try:
        for future in as_completed(pending):
            yield pending[future], future.result()
    finally:
        for future in pending:
            future.cancel()
