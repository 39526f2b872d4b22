"""Two processes on halves of each batch train HessianFree as one process on all of it."""

import os
import subprocess
import sys

import pytest
import torch
from torch import distributed as dist

from tests.optim.methods.hessian_free.worker import STEPS, WANTED, alone
from tests.paths import ROOT

WORLD = 2

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch without gloo")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of the processes found."""
    folder = tmp_path_factory.mktemp("hessian_free")
    command = [sys.executable, "-m", "tests.optim.methods.hessian_free.worker"]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(WORLD), str(folder / "meeting"), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * WORLD, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def check_agreed(one, other):
    """Two processes hold the same, bit for bit."""
    assert torch.equal(one["weights"], other["weights"])
    for a, b in zip(one["state"], other["state"], strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def check_equal(found, expected):
    # sums in another order over four steps of conjugate gradients
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-9, atol=1e-9)
    assert found["iterations"] == expected["iterations"]


@pytest.mark.parametrize(("kind", "name"), WANTED)
def test_the_result_is_that_of_one_process_on_the_joint_batch(processes, kind, name):
    found = [process[kind, name] for process in processes]
    check_agreed(*found)
    check_equal(found[0], alone(kind, name))


def test_blocks_end_at_their_own_time(processes):
    """Both processes notice a converged block at the same iteration."""
    found = [process["long"] for process in processes]
    check_agreed(*found)
    assert len(set(found[0]["iterations"])) > 1
    assert max(found[0]["iterations"]) < STEPS * 60


def test_the_module_inside_may_be_given(processes):
    found = [process["inner"] for process in processes]
    check_agreed(*found)
    check_equal(found[0], alone("blocks", "mlp"))


def test_every_process_draws_rows_of_its_own(processes):
    one, other = [process["subset"] for process in processes]
    check_agreed(one, other)
    assert one["rows"] != other["rows"]
    assert [len(rows) for rows in one["rows"]] == [2] * STEPS


def test_martens_rules_are_refused(processes):
    for process in processes:
        said, still = process["refused"]
        assert "MartensHessianFree does not support several processes" in said
        assert "use HessianFree" in said
        assert still
