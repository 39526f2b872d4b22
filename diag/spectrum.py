"""Eigenvalues of an operator: exact, extreme, and their density."""
