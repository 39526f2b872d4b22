"""Studies without worker processes: what they submit is done at once, as a worker would do it."""

from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager

import pytest
import torch

from kronscope.studies.training import workers


class AtOnce(Executor):
    """Calls in this process, with a worker's default dtype; the number of threads stays."""

    def submit(self, function, /, *arguments):
        future, dtype, threads = Future(), torch.get_default_dtype(), torch.get_num_threads()
        torch.set_default_dtype(torch.float32)
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
        return future


@contextmanager
def in_process() -> Iterator[None]:
    """Inside, no study starts a process: each start costs seconds of imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "shared_pool", lambda _: AtOnce())
        yield
