"""Results as `error_along_training` would write them, made up in milliseconds."""

from itertools import product
from pathlib import Path

import numpy as np

from kronscope.studies.results import records

SIZES = {"0": 3120, "2": 1176, "4": 200, "6": 224, "8": 1200, "10": 3136}
BASE = {"kfac": 0.42, "diagonal": 0.86, "mini_block": 0.66, "best_kronecker": 0.31}
LIVE = {"kbfgs": {"kbfgs_live": 3.5}, "kfac": {"kfac_live": 0.55}, "adam": {}}
STEPS = (0, 25, 50, 75, 100)
METRICS = {
    "relative_error": {
        "formula": "‖B − C‖_F / ‖C‖_F",
        "range": "[0, ∞)",
        "best": "0",
        "reference": "Martens and Grosse 2015, section 6.3",
    },
    "relative_error_best_scale": {
        "formula": "min_s ‖s B − C‖_F / ‖C‖_F = √(1 − cos²)",
        "range": "[0, 1]",
        "best": "0",
        "reference": "follows from the cosine",
    },
    "cosine": {
        "formula": "⟨B, C⟩ / (‖B‖_F ‖C‖_F)",
        "range": "[-1, 1]",
        "best": "1",
        "reference": "Golub and Van Loan, section 2.3",
    },
    "excess_over_best_kronecker": {
        "formula": "relative_error(B) − min_{L, R} relative_error(L ⊗ R)",
        "range": "[0, ∞) for Kronecker products",
        "best": "0",
        "reference": "Van Loan and Pitsianis 1993",
    },
    "noise_floor": {
        "formula": "‖C₁ − C₂‖_F / (2 ‖C‖_F) over half splits",
        "range": "[0, ∞)",
        "best": "0",
        "reference": "half-split estimate",
    },
    "step_cosine": {
        "formula": "cos((B + λI)⁻¹ g, (C + λI)⁻¹ g)",
        "range": "[-1, 1]",
        "best": "1",
        "reference": "Kunstner et al. 2019",
    },
    "preconditioned_condition": {
        "formula": "κ((B + λI)^(-1/2) (C + λI) (B + λI)^(-1/2))",
        "range": "[1, ∞]",
        "best": "1",
        "reference": "Axelsson 1994",
    },
}
HEADER = {
    "study": "error_along_training",
    "problem": "digits-autoencoder",
    "status": "finished",
    "created": "2026-01-01T12:00:00+00:00",
    "versions": {"kronscope": "0.1.0", "torch": "2.13.0"},
    "device": "cpu",
    "commit": "0123456789abcdef",
    "config": {"steps": 100, "every": 25, "batch": 100},
    "metrics": METRICS,
    "seconds": 61.5,
}


def row(**own):
    """One record; what is not given is empty."""
    empty = dict.fromkeys(("run", "study", "problem", "block", "truth", "approximation"), "")
    numbers = {"seed": 0, "epoch": 0.0, "size": 0, "damping": np.nan, "n": 500, "seconds": 0.0}
    names = {"run": "made-up", "study": HEADER["study"], "problem": HEADER["problem"]}
    return empty | numbers | {"low": np.nan, "high": np.nan} | names | own


def values(error, best, rng):
    """The metrics of an approximation with this relative error: metric -> (value, low, high)."""
    shape = min(error, 0.95) * rng.uniform(0.9, 1.0)
    condition = np.inf if error > 4 else 1 + 40 * error**2
    return {
        "relative_error": (error, error * 0.94, error * 1.07),
        "relative_error_best_scale": (shape, shape * 0.97, min(shape * 1.02, 1)),
        "cosine": (np.sqrt(1 - shape**2), np.nan, np.nan),
        "excess_over_best_kronecker": (error - best, error - best - 0.01, error - best + 0.01),
        "preconditioned_condition": (condition, np.nan, np.nan),
        "step_cosine": (1 - shape**2 * 0.7, 1 - shape**2 * 0.75, 1 - shape**2 * 0.65),
    }


def block_rows(place, truth, level, live, rng):
    """All metrics of all approximations of one block at one step against one truth."""
    best = BASE["best_kronecker"] * level
    rows = [row(**place, truth=truth, metric="noise_floor", value=0.22 * level)]
    for approximation, base in (BASE | live).items():
        error = base * level * rng.uniform(0.97, 1.03) if base != best else best
        for metric, (value, low, high) in values(error, best, rng).items():
            damped = metric in ("preconditioned_condition", "step_cosine")
            numbers = {"value": value, "low": low, "high": high}
            numbers["damping"] = 0.3 if damped else np.nan
            own = {"truth": truth, "approximation": approximation, "metric": metric}
            rows.append(row(**place, **own, **numbers))
    return rows


def rows(steps=STEPS, optimizers=tuple(LIVE), sizes=SIZES):
    """All rows of a run."""
    rng, found = np.random.default_rng(0), []
    for number, optimizer in enumerate(optimizers):
        for step in steps:
            place = {"optimizer": optimizer, "step": step, "epoch": step / 15}
            loss = 4 + 40 * np.exp(-step / (20 + 10 * number))
            found.append(row(**place, metric="train_loss", value=loss))
            found.append(row(**place, metric="test_loss", value=loss * 1.08))
            for depth, (block, size) in enumerate(sizes.items()):
                for truth in ("ggn", "hessian"):
                    level = (0.5 + depth / 8) * (1.25 if truth == "hessian" else 1)
                    level *= 1 - 0.4 * np.exp(-step / 40)
                    own = place | {"block": block, "size": size}
                    found += block_rows(own, truth, level, LIVE[optimizer], rng)
    return found


def matrices(size, live, rng):
    """A block's pictures: an almost Kronecker truth and what the approximations make of it."""
    small = 12
    left, right = (m @ m.T / 9 for m in rng.standard_normal((2, small, 9)))
    kronecker = np.kron(left, right)
    noise = rng.standard_normal(kronecker.shape) * 0.1
    exact = kronecker + noise + noise.T
    pictures = {"kfac": kronecker, "diagonal": np.diag(np.diag(exact))}
    pictures["mini_block"] = exact * np.kron(np.eye(small), np.ones((small, small)))
    pictures["best_kronecker"] = kronecker * 1.02
    pictures |= {name: kronecker * 1.5 for name in live}
    differences = {records.difference_name(name): m - exact for name, m in pictures.items()}
    whole = {"exact": exact} | pictures | differences
    return {name: records.reduce_matrix(m, min(size, 240)) for name, m in whole.items()}


def write_run(
    results: Path, name="made-up", optimizers=tuple(LIVE), steps=STEPS, sizes=SIZES, **header
) -> Path:
    """Write a whole run (header, two parts, matrices at its ends) and return its folder."""
    run = Path(results) / name
    records.write_header(run, HEADER | header)
    whole = rows(steps, optimizers, sizes)
    records.append(run, whole[: len(whole) // 2])
    records.append(run, whole[len(whole) // 2 :])
    rng = np.random.default_rng(1)
    for optimizer in optimizers:
        for step in (steps[0], steps[-1]):
            for (block, size), truth in product(sizes.items(), ("ggn", "hessian")):
                values = (optimizer, 0, step, block, truth, size)
                key = dict(zip(records.MATRIX_KEY, values, strict=True))
                records.save_matrices(run, key, matrices(size, LIVE[optimizer], rng))
    return run
