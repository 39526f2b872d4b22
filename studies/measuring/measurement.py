"""Measure approximations against the exact blocks of a model, as rows for the records."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kronscope.diag import (
    Block,
    Estimate,
    Operator,
    Problem,
    approximations,
    dense,
    exact,
    live,
    metrics,
)

from ..results.records import difference_name, reduce_matrix
from ..training.state import TrainingState

UNDAMPED = "_undamped"

# built from the truth they are compared with, so that only their structure costs;
# KFAC is what it is, a GGN method, whatever it is compared with
OF_THE_TRUTH = ("diagonal", "mini_block", "best_kronecker")


@dataclass(frozen=True)
class Plan:
    """Truths, approximations and metrics of each measurement."""

    truths: Sequence[str] = ("hessian", "ggn")
    approximations: Sequence[str] = ("kfac", "diagonal", "mini_block", "best_kronecker")
    metrics: Sequence[str] = (
        "relative_error",
        "relative_error_best_scale",
        "cosine",
        "excess_over_best_kronecker",
        "preconditioned_condition",
        "step_cosine",
    )
    damping: float = 0.1
    examples: int = 256


def live_curvatures(name: str, state: TrainingState) -> dict[str, dict[str, Operator]]:
    """The optimizer's live curvature, {approximation name: {block: operator}}; {} if it has none.

    "<name>_live" is what it applies, P⁻¹ with its damping inside; "<name>_live_undamped" the
    curvature it keeps, where it keeps one.
    """
    if not hasattr(state.optimizer, "preconditioner"):
        return {}
    found = {f"{name}_live": live.curvatures(state.optimizer)}
    if undamped := live.undamped(state.optimizer):
        found[f"{name}_live{UNDAMPED}"] = undamped
    return found


def measure(
    problem: Problem,
    plan: Plan,
    lives: Mapping[str, Mapping[str, Operator]],
    blocks: Sequence[Block] | None = None,
) -> Iterator[dict[str, Any]]:
    """All metrics of all approximations of each block, as rows without the run's columns.

    blocks: those to measure, all that are `layers` unless given.
    """
    for block in layers(problem) if blocks is None else blocks:
        for of in plan.truths:
            truth = exact.truth(problem, block, of)
            floor = metrics.noise_floor(truth)
            yield _row(block, of, "", "noise_floor", math.nan, floor)
            for name, operator in operators(problem, block, of, plan, lives).items():
                for entry in (metrics.registry[m] for m in plan.metrics):
                    inside = damping_inside(name, lives)
                    keywords = _keywords(entry, problem, block, plan.damping, inside)
                    found = entry.function(truth, operator, **keywords)
                    damping = keywords.get("damping", math.nan)
                    yield _row(block, of, name, entry.name, damping, found)


def layers(problem: Problem) -> list[Block]:
    """Blocks of one matrix [W, b]: those that Kronecker approximations exist for."""
    return [block for block in problem.blocks() if block.single is not None and block.single.w_bar]


def not_measured(problem: Problem) -> list[str]:
    """Names of the blocks that are not `layers`: norms, recurrent cells."""
    names = {block.name for block in layers(problem)}
    return [block.name for block in problem.blocks() if block.name not in names]


def operators(
    problem: Problem,
    block: Block,
    of: str,
    plan: Plan,
    lives: Mapping[str, Mapping[str, Operator]],
) -> dict[str, Operator]:
    """Approximations of one block: built from data, then read from the optimizer."""
    found: dict[str, Operator] = {}
    for name in plan.approximations:
        entry = approximations.registry[name]
        target = of if name in OF_THE_TRUTH else entry.of
        found[name] = entry.function(problem, block, of=target)
    for name, blocks in lives.items():
        if block.name in blocks:
            found[name] = blocks[block.name]
    return found


def damping_inside(name: str, lives: Mapping[str, Any]) -> bool:
    """Whether a curvature includes its damping, as what an optimizer applies or replays does."""
    if name in lives:
        return not name.endswith(UNDAMPED)
    return approximations.registry[name].damping_inside


def _keywords(
    entry: metrics.Metric, problem: Problem, block: Block, damping: float, damped_inside: bool
) -> dict[str, Any]:
    """The keywords a metric needs; no damping is added where it is included already."""
    known = {
        "damping": damping,
        "gradient": problem.gradient(block),
        "problem": problem,
        "block": block,
    }
    keywords = {name: known[name] for name in entry.needs}
    if damped_inside and "damping" in keywords:
        keywords["approximation_damping"] = 0.0
    return keywords


def _row(
    block: Block, truth: str, name: str, metric_name: str, damping: float, found: Estimate
) -> dict[str, Any]:
    return {
        "block": block.name,
        "size": block.d,
        "truth": truth,
        "approximation": name,
        "damping": damping,
        "metric": metric_name,
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "n": found.n,
    }


def matrices(
    problem: Problem,
    block: Block,
    of: str,
    plan: Plan,
    lives: Mapping[str, Mapping[str, Operator]],
) -> dict[str, np.ndarray]:
    """Dense truth, approximations and differences of one block, reduced for the block inspector."""
    truth = dense(exact.truth(problem, block, of)).float().cpu().numpy()
    found = {"exact": reduce_matrix(truth)}
    for name, operator in operators(problem, block, of, plan, lives).items():
        matrix = dense(operator).float().cpu().numpy()
        found[name] = reduce_matrix(matrix)
        found[difference_name(name)] = reduce_matrix(matrix - truth)
    return found


def definitions(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Formula, range, best value and reference of each metric, for the run's header."""
    return {
        name: {
            "formula": metrics.registry[name].formula,
            "range": metrics.registry[name].range,
            "best": metrics.registry[name].best,
            "reference": metrics.registry[name].reference,
        }
        for name in names
    }
