"""The command `kronscope measure`: a problem's blocks against the exact ones, as a table."""

import math
from pathlib import Path

import rich.table
import torch

from kronscope.diag import Problem

from .. import problems
from ..results import options
from ..results.tables import Table
from ..training import checkpoints
from . import measurement


def blocks_table(
    problem: str, block: str, truth: str, examples: int, checkpoint: Path | None, seed: int
) -> rich.table.Table:
    """Measure a problem's blocks at its initial or checkpointed parameters.

    Raises: ValueError for an unknown problem, block, truth or checkpoint, and as `options.options`.
    """
    options.options({"examples": examples, "seed": seed})
    setting = problems.get(problem)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = setting.model()
    if checkpoint is not None:
        checkpoints.load_model(model, problem, checkpoint)
    data = setting.data()
    inputs, targets = data.train_inputs[:examples], data.train_targets[:examples]
    found = Problem(model, setting.loss, inputs, targets, dtype=torch.float64)
    plan = measurement.Plan(truths=(truth,), damping=setting.measure_damping)
    blocks = [found.block(block)] if block else found.blocks()
    rows = []
    for row in measurement.measure(found, plan, {}, blocks):
        interval = "" if math.isnan(row["low"]) else f"{row['low']:.4g} … {row['high']:.4g}"
        name = row["approximation"] or "exact"
        place = (row["block"], f"{row['size']:,}", name, row["metric"])
        rows.append([*place, f"{row['value']:.4g}", interval])
    columns = ("block", "d", "approximation", "metric", "value", "95 % interval")
    return Table("", columns, rows).for_terminal(truth)
