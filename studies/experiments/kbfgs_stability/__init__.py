"""Why K-BFGS diverges and what keeps it from diverging."""
