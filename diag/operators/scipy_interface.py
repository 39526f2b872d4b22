"""Operators as SciPy sees them."""

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from .structures import Operator, like

DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def to_scipy(operator: Operator) -> LinearOperator:
    """Return the operator [d, d] as a scipy.sparse.linalg.LinearOperator, for eigsh, cg, ...

    It has the operator's dtype; NumPy vectors [d], [d, 1] or [d, k] are taken to the operator's
    device and back. The operator is symmetric, so that its adjoint is itself.

    Raises: TypeError for a dtype other than float32 and float64, which SciPy's solvers lack, and
    for complex vectors.

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

    def product(v: np.ndarray) -> np.ndarray:
        if np.iscomplexobj(v):
            raise TypeError("operators multiply real vectors; give real and imaginary part apart")
        # a copy: the vector may be read-only or have negative strides, which torch refuses
        columns = torch.from_numpy(np.array(v, dtype=dtype, order="C")).to(entries.device)
        return _apply(operator, columns)

    shape = tuple(operator.shape)
    return LinearOperator(
        shape, matvec=product, rmatvec=product, matmat=product, rmatmat=product, dtype=dtype
    )


@torch.no_grad()
def _apply(operator: Operator, v: Tensor) -> np.ndarray:
    return (operator @ v).cpu().numpy()
