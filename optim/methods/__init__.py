"""The optimizers, one folder each; none imports another."""
