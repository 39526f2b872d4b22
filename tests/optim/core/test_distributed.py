"""Two processes on halves of each batch train as one process on all of it."""

import os
import subprocess
import sys

import pytest
import torch
from torch import distributed as dist

from tests.optim.cases import QUICK, each
from tests.optim.core.worker import INSIDE, KINDS, OF_LAYERS, alone, inverted, whole
from tests.optim.models import CASES
from tests.paths import ROOT

WORLD = 2

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch without gloo")
every = pytest.mark.parametrize("kind", each(KINDS))


def found_by_processes(kinds, tmp_path_factory):
    """What each of the processes found."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "tests.optim.core.worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [
                *command,
                str(rank),
                str(WORLD),
                str(folder / "meeting"),
                str(folder),
                ",".join(kinds),
            ],
            env=environment,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * WORLD, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def quick_kinds(tmp_path_factory):
    return found_by_processes([kind for kind in KINDS if kind in QUICK], tmp_path_factory)


@pytest.fixture(scope="module")
def slow_kinds(tmp_path_factory):
    return found_by_processes([kind for kind in KINDS if kind not in QUICK], tmp_path_factory)


@pytest.fixture
def processes(request):
    """One set of processes for the quick tests, another for the rest."""
    kind = getattr(request.node, "callspec", None)
    quick = kind is None or kind.params["kind"] in QUICK
    return request.getfixturevalue("quick_kinds" if quick else "slow_kinds")


def check_equal(found, expected):
    """Weights, state and preconditioners agree."""
    # sums in another order, five steps, inverses of condition below 1e4
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-10, atol=1e-10)
    assert found["P"].keys() == expected["P"].keys()
    for name, P in expected["P"].items():
        torch.testing.assert_close(found["P"][name], P, rtol=1e-8, atol=1e-9)


def check_agreed(one, other):
    """Two processes hold the same, bit for bit."""
    assert torch.equal(one["weights"], other["weights"])
    for a, b in zip(one["state"], other["state"], strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


@every
def test_the_result_is_that_of_one_process_on_the_joint_batch(processes, kind):
    expected = alone(kind, "cnn")
    for how in ["cnn", *(["inner"] if kind in INSIDE else [])]:  # inner: the module in DDP is given
        found = [process[kind, how] for process in processes]
        check_agreed(*found)
        check_equal(found[0], expected)


@every
def test_micro_batches_in_every_process(processes, kind):
    found = [process[kind, "pieces"] for process in processes]
    check_agreed(*found)
    check_equal(found[0], alone(kind, "shared"))


@pytest.mark.parametrize("kind", each(OF_LAYERS))
def test_parts_of_other_sizes(processes, kind):
    """Statistics are means over all examples, whichever process has more of them."""
    found = [process[kind, "uneven"] for process in processes]
    check_agreed(*found)
    expected = whole(kind)
    for name, P in expected["P"].items():
        torch.testing.assert_close(found[0]["P"][name], P, rtol=1e-9, atol=1e-10)


def test_inverses_are_shared_out(processes):
    case = CASES["mlp"]()
    alone = inverted(case.model, case, case.batches[0])
    counts = [process["inverted"] for process in processes]
    assert sum(counts) == alone
    assert 0 < min(counts) < alone  # by cost, of matrices of several sizes


def test_what_cannot_be_done_is_said_in_every_process(processes):
    for process in processes:
        said = process["errors"]
        assert "DistributedDataParallel model itself, not the Sequential" in said["inner module"]
        assert "LayerwiseStep does not support several processes (2" in said["layerwise"]
        assert "KFAC2015 does not support several processes" in said["rescale"]
        assert (
            "['module.second'] were used in some of the 2 processes" in said["some processes only"]
        )


def test_every_process_draws_labels_of_its_own(processes):
    assert len({process["labels"] for process in processes}) == WORLD
