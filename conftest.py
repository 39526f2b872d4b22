"""Float64 everywhere in tests and doctests: the truth is slow, obvious and exact."""

import os
import sys

import pytest
import torch

torch.set_default_dtype(torch.float64)
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
    torch.set_num_threads(1)


class _OneName:
    """Refuses `import diag`: a second copy would have registries of its own."""

    @staticmethod
    def find_spec(name, _path=None, _target=None):
        if name in ("diag", "optim", "studies", "app"):
            raise ImportError(f"import kronscope.{name}, not the folder {name}")


sys.meta_path.insert(0, _OneName)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
