"""K-BFGS replayed on a problem's data: the passes over the batch and the update formulas."""
