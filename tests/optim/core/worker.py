"""One of several processes that train on parts of one batch: test_distributed.py starts them.

Arguments: rank, world size, a file to meet at, a folder for the results, optimizers.
"""

import datetime
import sys
from contextlib import nullcontext

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kronscope import optim
from tests.optim.cases import (
    MAKE,
    closure_of,
    dense,
    loss_of,
    make_for,
    state_of,
    train_on,
    weights,
)
from tests.optim.models import CASES

SETTINGS = {"update_every": 2, "refresh_every": 2, "weight_decay": 0.01}
STEPS = 4
INSIDE = ["kfac", "ekfac-empirical", "tnt"]
KINDS = sorted(set(MAKE) - {"kfac-2015"})  # which is refused
# what MBF, Shampoo, TNT of the data's labels and EKFAC-ra learn is made of .grad, which
# DistributedDataParallel averages over processes, not over examples
OF_LAYERS = [kind for kind in KINDS if kind not in ("mbf", "shampoo", "tnt-empirical", "ekfac-ra")]


def start(kind, case):
    """The optimizer, with labels that depend on the example alone."""
    opt = make_for(kind, case, **SETTINGS)
    if opt._harness.capture.sample is not None:
        opt._harness.capture.sample = lambda output: torch.sin(5 * output)
    return opt


def results(opt, model):
    """What all processes must agree on, with each other and with one alone."""
    state = [
        {k: v for k, v in state.items() if not k.endswith("_failures")} for state in state_of(opt)
    ]
    P = {name.removeprefix("module."): P for name, P in dense(opt).items()}
    return {"weights": weights(model), "state": state, "P": P}


def alone(kind, name):
    """One process on the joint batches."""
    case = CASES[name]()
    opt = start(kind, case)
    train_on(opt, case, case.batches[:STEPS])
    return results(opt, case.model)


def together(kind, name, rank, world, *, inner=False, pieces=1):
    """This process on its part, in `pieces` micro-batches."""
    case = CASES[name]()
    model = DistributedDataParallel(case.model)
    opt = start(kind, case if inner else case._replace(model=model))
    for batch in case.batches[:STEPS]:
        parts = [values.chunk(world)[rank].chunk(pieces) for values in batch]

        def closure(parts=parts):
            opt.zero_grad()
            total = 0.0
            micro = list(zip(*parts, strict=True))
            for i, part in enumerate(micro):
                with model.no_sync() if i < len(micro) - 1 else nullcontext():
                    loss = case.loss(model, part) / len(micro)
                    loss.backward()
                total += loss.detach()
            return total

        opt.step(closure)
    return results(opt, case.model)


def one_step(kind, case, model, batch):
    """P after one step at lr=0."""
    opt = start(kind, case._replace(model=model))
    opt.param_groups[0]["lr"] = 0.0
    opt.step(closure_of(opt, model, batch, case.loss))
    return results(opt, case.model)


def uneven(kind, rank):
    """This process on five or three of the eight examples."""
    case = CASES["cnn"]()
    part = tuple(values.split([5, 3])[rank] for values in case.batches[0])
    return one_step(kind, case, DistributedDataParallel(case.model), part)


def whole(kind):
    """One process on all eight."""
    case = CASES["cnn"]()
    return one_step(kind, case, case.model, case.batches[0])


class Sometimes(nn.Module):
    """A layer that only the first process uses."""

    def __init__(self, rank):
        super().__init__()
        self.first, self.second, self.rank = nn.Linear(6, 6), nn.Linear(6, 6), rank

    def forward(self, x):
        x = self.first(x)
        return self.second(x) if self.rank == 0 else x


def errors(rank):
    """What is said of what cannot be done, and by whom."""
    said = {}

    def note(name, run):
        try:
            run()
        except ValueError as error:
            said[name] = str(error)

    case = CASES["mlp"]()
    model = DistributedDataParallel(case.model)
    closure = lambda opt: closure_of(opt, model, case.batches[0], case.loss)  # noqa: E731
    bfgs = optim.KBFGS(case.model)
    note("inner module", lambda: bfgs.step(closure(bfgs)))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = optim.LayerwiseStep(sgd, model)
    note("layerwise", lambda: steps.step(closure(sgd)))
    rescaled = optim.KFAC2015(model)
    note("rescale", lambda: rescaled.step(closure(rescaled)))
    sometimes = DistributedDataParallel(Sometimes(rank), find_unused_parameters=True)
    kfac = optim.KFAC(sometimes)
    x = case.batches[0][0]
    note(
        "some processes only",
        lambda: kfac.step(closure_of(kfac, sometimes, x, loss_of)),
    )
    return said


def inverted(model, case, batch):
    """How many matrices this process inverts in a first step of KFAC."""
    many, cholesky = [], torch.linalg.cholesky_ex

    def counted(M):
        many.append(len(M))
        return cholesky(M)

    opt = start("kfac", case._replace(model=model))
    torch.linalg.cholesky_ex = counted
    try:
        opt.step(closure_of(opt, model, batch, case.loss))
    finally:
        torch.linalg.cholesky_ex = cholesky
    return sum(many)


def main(rank, world, meeting, folder, kinds):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    found = {}
    for kind in [kind for kind in INSIDE if kind in kinds]:
        found[kind, "inner"] = together(kind, "cnn", rank, world, inner=True)
    for kind in kinds:
        found[kind, "cnn"] = together(kind, "cnn", rank, world)
        found[kind, "pieces"] = together(kind, "shared", rank, world, pieces=2)
    for kind in sorted(set(OF_LAYERS) & set(kinds)):
        found[kind, "uneven"] = uneven(kind, rank)
    case = CASES["mlp"]()
    parts = tuple(values.chunk(world)[rank] for values in case.batches[0])
    found["inverted"] = inverted(DistributedDataParallel(case.model), case, parts)
    found["errors"] = errors(rank)
    found["labels"] = optim.KFAC(nn.Linear(2, 2))._harness.labels.initial_seed()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5].split(","))
