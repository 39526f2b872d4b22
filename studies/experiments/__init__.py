"""The studies of `kronscope study`: one file or folder each, with a question, a grid and a run.

This file imports none of them, so that reading their names does not load torch.
"""

_STABILITY = f"{__name__}.kbfgs_stability"

# what `kronscope study NAME` finds: {name: module}, each with Grid, TINY and run
STUDIES = {
    "error_along_training": f"{__name__}.error_along_training",
    "optimizers_compared": f"{__name__}.optimizers_compared",
    "equal_seconds": f"{__name__}.equal_seconds",
    "stability": f"{_STABILITY}.stability",
    "cures": f"{_STABILITY}.cures",
    "sharpness_along_training": f"{_STABILITY}.sharpness_along_training",
    "block_hessian_free": f"{__name__}.block_hessian_free",
}
