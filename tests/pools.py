"""Studies without worker processes, on a problem small enough for dense matrices of it all."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager

import pytest
import torch

from kronscope.studies import problems
from kronscope.studies.problems.autoencoders import autoencoder
from kronscope.studies.training import workers

FOUR_LAYERS = dataclasses.replace(
    problems.get("digits-autoencoder-small"),
    name="four-layers",
    model=lambda: autoencoder((64, 8, 5, 8, 64), torch.nn.Tanh),
)


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
    """Inside, no study starts a process (seconds of imports), and FOUR_LAYERS is registered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(problems.PROBLEMS, FOUR_LAYERS.name, FOUR_LAYERS)
        patch.setattr(workers, "shared_pool", lambda _: AtOnce())
        yield
