"""200 measurements in a row, each with a Problem of its own, leave nothing behind."""

import gc
import os
import tracemalloc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from kronscope.diag import Problem, approximations, exact, metrics
from kronscope.diag.statistics.intervals import REPLICATES

WARM_UP, MEASUREMENTS, TRACED = 30, 200, 40
N, INPUTS, OUTPUTS = 24, 5, 3
# A measurement holds 1.5 MiB of tensors while it lasts (replicates of 2 truths, [1001, N] each) and
# 0.25 MiB of Python objects. A tenth of either kept each time would be 30 and 1 MiB.
RESIDENT_BYTES = 8 * 2**20  # the allocator's to-and-fro is 1 MiB
PYTHON_BYTES = 2**17  # free lists that are still filling take 2**15


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def resident_bytes():
    """Memory of this process that is in RAM, by Linux's own count."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def measure(model, seed):
    """One step of a study: truths, approximations and metrics of one layer; a weak reference."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, INPUTS, generator=generator)
    t = torch.randint(OUTPUTS, (N,), generator=generator)
    problem = Problem(model, nn.CrossEntropyLoss(), x, t)
    block = problem.block("0")
    for of in ("ggn", "hessian"):
        truth = exact.truth(problem, block, of)
        for method in (approximations.kfac, approximations.mini_block):
            made = method(problem, block, of=of)
            for metric in (
                metrics.relative_error,
                metrics.cosine,
                metrics.excess_over_best_kronecker,
                metrics.population_error,
                metrics.population_cosine,
            ):
                metric(truth, made)
            metrics.step_cosine(truth, made, damping=1.0, gradient=problem.gradient(block))
        metrics.noise_floor(truth)
        metrics.population_norm(truth)
    return weakref.ref(problem), weakref.ref(truth), weakref.ref(made)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_200_measurements_do_not_grow_memory(network, one_thread):
    """Resident memory from the 30th measurement to the 230th, Python's own over 40 more."""
    del one_thread
    model = network([INPUTS, 4, OUTPUTS], nn.Tanh)
    for seed in range(WARM_UP):
        measure(model, seed)
    gc.collect()
    resident = resident_bytes()
    made = [measure(model, seed) for seed in range(MEASUREMENTS)]
    gc.collect()
    assert resident_bytes() - resident < RESIDENT_BYTES
    assert not [ref for refs in made for ref in refs if ref() is not None]
    tracemalloc.start()  # takes memory itself, hence afterwards
    try:
        measure(model, 0)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for seed in range(TRACED):
            measure(model, seed)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < PYTHON_BYTES
    finally:
        tracemalloc.stop()


def test_a_problem_dies_without_the_garbage_collector(network):
    """No reference cycle holds a problem or its truths: a study's memory falls as it goes."""
    model = network([INPUTS, 4, OUTPUTS], nn.Tanh)
    gc.collect()
    gc.disable()
    try:
        assert all(ref() is None for ref in measure(model, 0))
    finally:
        gc.enable()


def test_batches_of_many_sizes_leave_few_bootstrap_counts(network):
    """Counts are kept for the next question about the same size, not for every size there was."""
    model = network([INPUTS, 4, OUTPUTS], nn.Tanh)
    for n in range(2, 14):
        problem = Problem(
            model, nn.CrossEntropyLoss(), torch.randn(n, INPUTS), torch.randint(OUTPUTS, (n,))
        )
        truth = exact.ggn(problem, problem.block("0"))
        metrics.relative_error(truth, approximations.diagonal(problem, problem.block("0")))
    gc.collect()
    alive = (t for t in gc.get_objects() if type(t) is torch.Tensor)
    assert len([t for t in alive if t.ndim == 2 and len(t) == REPLICATES]) <= 4
