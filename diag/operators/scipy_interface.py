"""Operators as scipy.sparse.linalg.LinearOperator."""

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator

from .structures import Operator, like

DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def to_scipy(operator: Operator) -> LinearOperator:
    """The operator [d, d] as a scipy.sparse.linalg.LinearOperator, for eigsh, cg, ...

    It has the operator's dtype and takes NumPy vectors [d], [d, 1] or [d, k].

    Raises: TypeError for a dtype other than float32 and float64, and for complex vectors.

    >>> from kronscope.diag.operators.structures import Diagonal
    >>> to_scipy(Diagonal(torch.tensor([2.0, 3.0]))) @ np.ones(2)
    array([2., 3.])
    """
    entries = like(operator)
    if entries.dtype not in DTYPES:
        raise TypeError(
            f"SciPy's solvers work in float32 and float64, not {entries.dtype}; convert the "
            f"tensors of this {type(operator).__name__} to one of them first"
        )
    dtype = DTYPES[entries.dtype]

    @torch.no_grad()
    def product(v: np.ndarray) -> np.ndarray:
        if np.iscomplexobj(v):
            raise TypeError("operators multiply real vectors; give real and imaginary part apart")
        # a copy: the vector may be read-only or have negative strides, which torch refuses
        columns = torch.from_numpy(np.array(v, dtype=dtype, order="C")).to(entries.device)
        return (operator @ columns).cpu().numpy()

    products = dict.fromkeys(("matvec", "rmatvec", "matmat", "rmatmat"), product)
    return LinearOperator(tuple(operator.shape), dtype=dtype, **products)
