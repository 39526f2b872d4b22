"""Summaries of records: labels, numbers as text, medians, verdicts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

LABELS = {  # where blanks for underscores are not enough
    "relative_error": "relative Frobenius error",
    "relative_error_best_scale": "relative error at the best scale",
    "cosine": "matrix cosine",
    "excess_over_best_kronecker": "relative error − best Kronecker's",
    "preconditioned_condition": "preconditioned condition number",
    "step_cosine": "cosine with the exact step",
    "ggn": "GGN",
    "hessian": "Hessian",
}
BOUND, NOISE = "best_kronecker", "noise_floor"
PUBLISHED = ", published"  # ends the name of an optimizer whose curve others have printed
TABLES = {  # that studies put into the header, by their keys there
    "comparison": "Comparison",
    "published": "Beside published curves",
    "ranking": "At equal seconds",
}
ROUNDING = 1e-10  # the metrics are relative: below this, float64 sums no longer tell


def label(name: str) -> str:
    """Printed name of a metric or a truth."""
    return LABELS.get(name, name.replace("_", " "))


def number(value: float) -> str:
    """A number with three significant digits; ∞ for infinity, – for NaN."""
    if np.isnan(value):
        return "–"
    if abs(value) <= ROUNDING:
        return "0" if value == 0 else "≈ 0"
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:#.3g}".rstrip(".")


def drawn(frame: pd.DataFrame, header: Mapping[str, Any]) -> pd.DataFrame:
    """Records to draw: those of the header's "shown" optimizers, if it names any."""
    return frame[frame["optimizer"].isin(header["shown"])] if "shown" in header else frame


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names: those of LABELS first, in its order, then the others by alphabet."""
    known = list(LABELS)
    return sorted(set(names), key=lambda n: (known.index(n) if n in known else len(known), n))


def last(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of each optimizer at its last step."""
    return frame[frame["step"] == frame.groupby("optimizer")["step"].transform("max")]


def medians(frame: pd.DataFrame, truth: str) -> pd.DataFrame:
    """Median over the layers of each metric at each optimizer's last step.

    Index optimizer, approximation; a column per metric. The noise floor has approximation "".
    Several seeds or dampings go into the same median.
    """
    rows = last(frame[(frame["truth"] == truth) & (frame["block"] != "")])
    table = rows.pivot_table("value", ["optimizer", "approximation"], "metric", "median")
    return table[in_order(table.columns)]


def verdicts(frame: pd.DataFrame) -> dict[str, str]:
    """Which approximation is closest, and how close, for each truth and optimizer, as text.

    Uses relative_error, step_cosine and noise_floor at the last step, as medians over layers;
    pairs without a relative error are left out. Keys say the optimizer, its step and the truth.
    """
    found = {}
    for truth in sorted(set(frame["truth"]) - {""}):
        table = medians(frame, truth)
        steps = frame[frame["truth"] == truth].groupby("optimizer")["step"].max()
        for optimizer in table.index.unique("optimizer"):
            own = table.loc[optimizer]
            errors = own.get("relative_error", pd.Series(dtype=float))
            errors = errors.drop([BOUND, ""], errors="ignore")
            if np.isfinite(errors).any():
                place = f"Exact {label(truth)}, {optimizer} at step {steps[optimizer]:,}"
                found[place] = _verdict(own, errors)
    return found


def _verdict(own: pd.DataFrame, errors: pd.Series) -> str:
    """The least of `errors` beside the Kronecker bound, the noise and the step, as text."""
    error, said = errors.min(), f"{errors.idxmin()} is closest"
    said += f", with a relative error of {number(error)} (median over the layers)"
    bound = own["relative_error"].get(BOUND, np.nan)
    if bound > 0:
        said += f", {number(error / bound)} times that of the best possible Kronecker product"
    floor = own[NOISE].get("", np.nan) if NOISE in own else np.nan
    if np.isfinite(floor):
        where = "within" if error <= floor else f"{error / floor:.1f} times"
        said += f" and {where} the sampling noise of the exact block itself ({number(floor)})"
    for name in errors.index[errors.index.str.endswith("_live") & (errors > error)]:
        said += f"; what the optimizer itself applies ({name}, damping included) is at "
        said += number(errors[name])
    cosines = own.get("step_cosine", pd.Series(dtype=float)).drop(BOUND, errors="ignore").dropna()
    if not cosines.empty:
        said += f"; the step nearest to the exact one is {cosines.idxmax()}'s"
        said += f" (median cosine {cosines.max():.3f})"
    return said + "."


def share(count: int, of: int) -> str:
    """A fraction with its 95 % Wilson interval, as text.

    >>> share(13, 20)
    '13 of 20 (43–82 %)'
    """
    low, high = binomtest(count, of).proportion_ci(method="wilson")
    return f"{count} of {of} ({100 * low:.0f}–{100 * high:.0f} %)"


def span(steps: Sequence[int]) -> str:
    """Median and range, as text.

    >>> span([22, 25, 54]), span([])
    ('25 (22–54)', '–')
    """
    return f"{np.median(steps):g} ({min(steps)}–{max(steps)})" if steps else "–"
