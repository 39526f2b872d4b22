"""Float64 everywhere in tests and doctests: the truth is slow, obvious and exact."""

import pytest
import torch

torch.set_default_dtype(torch.float64)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
