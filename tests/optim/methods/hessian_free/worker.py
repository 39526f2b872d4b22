"""One of several processes that train HessianFree on parts of one batch.

Arguments: rank, world size, a file to meet at, a folder for the results.
"""

import datetime
import sys
from contextlib import nullcontext

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kronscope import optim
from tests.optim.cases import closure_of, state_of, weights
from tests.optim.methods.hessian_free.cases import make, make_for, step
from tests.optim.models import CASES

SETTINGS = {
    "plain": {"blocks": None, "weight_decay": 0.01},
    "blocks": {"blocks": []},
    "long": {"blocks": [], "max_cg": 60, "damping": 3.0},
}
WANTED = [("plain", "mlp"), ("blocks", "cnn"), ("plain", "shared"), ("blocks", "shared")]
STEPS = 4


def results(opt, model):
    """What all processes must agree on, with each other and with one alone."""
    iterations = [int(opt.state[part.parameters[0]]["counts"][1]) for part in opt.parts]
    state = state_of(opt)
    return {"weights": weights(model), "state": state, "iterations": iterations}


def alone(kind, name):
    """One process on the joint batches."""
    case = CASES[name]()
    opt = make_for(case, **SETTINGS[kind], curvature_batch=8)
    for batch in case.batches[:STEPS]:
        step(opt, case, batch)
    return results(opt, case.model)


def together(kind, name, rank, world, *, pieces=1, inner=False, rows=None):
    """This process on its part, in so many micro-batches; `rows` examples for the curvature."""
    case = CASES[name]()
    model = DistributedDataParallel(case.model)
    given = case.model if inner else model
    opt = make(given, likelihood=case.likelihood, **SETTINGS[kind], curvature_batch=rows or 4)
    drawn = []
    for batch in case.batches[:STEPS]:
        parts = [values.chunk(world)[rank].chunk(pieces) for values in batch]

        def closure(parts=parts):
            opt.zero_grad()
            micro = list(zip(*parts, strict=True))
            total = 0.0
            for i, part in enumerate(micro):
                with model.no_sync() if i < len(micro) - 1 else nullcontext():
                    loss = case.loss(model, part) / len(micro)
                    loss.backward()
                total += loss.detach()
            return total

        opt.step(closure)
        drawn.append(None if opt.rows is None else opt.rows.tolist())
    return {**results(opt, case.model), "rows": drawn}


def refused():
    """What MartensHessianFree says, and whether the parameters are as before."""
    case = CASES["mlp"]()
    model = DistributedDataParallel(case.model)
    opt, before = make(model, method=optim.MartensHessianFree), weights(case.model)
    try:
        opt.step(closure_of(opt, model, case.batches[0], case.loss))
    except ValueError as error:
        return str(error), torch.equal(before, weights(case.model))
    return "nothing", False


def main(rank, world, meeting, folder):
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
    for kind, name in WANTED:
        found[kind, name] = together(kind, name, rank, world, pieces=1 + (name == "shared"))
    found["long"] = together("long", "mlp", rank, world)
    found["inner"] = together("blocks", "mlp", rank, world, inner=True)
    found["subset"] = together("blocks", "mlp", rank, world, rows=2)
    found["refused"] = refused()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
