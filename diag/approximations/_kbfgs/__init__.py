"""K-BFGS replayed on a problem's data at fixed parameters."""
