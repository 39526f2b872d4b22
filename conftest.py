"""Float64 everywhere in tests and doctests: the truth is slow, obvious and exact."""

import os

import pytest
import torch

torch.set_default_dtype(torch.float64)
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
