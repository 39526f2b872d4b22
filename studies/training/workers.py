"""The worker processes that a study's parts are given to."""

from concurrent.futures import Executor

from loky import get_reusable_executor

# PyTorch asks for large pages: fresh memory costs more than the arithmetic on it otherwise
LARGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
IDLE = 3600.0  # seconds; one that gives up earlier may do so while it is being given work


def shared_pool(workers: int) -> Executor:
    """`workers` processes, those of the last call where they are still there."""
    return get_reusable_executor(max_workers=workers, timeout=IDLE, env=LARGE_PAGES)
