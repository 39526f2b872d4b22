"""Scripted analyses: train, measure along the way, write tidy records, draw figures.

This file stays free of imports: the dashboard reads `studies.records` and `studies.figures`
without ever loading torch.
"""

# files that `kronscope study` runs
STUDIES = (
    "error_along_training",
    "optimizers_compared",
    "equal_seconds",
    "stability",
    "cures",
    "sharpness_along_training",
    "block_hessian_free",
)
