"""Hessian-free optimization, plain, block-diagonal, and with Martens' rules."""

from .hessian_free import HessianFree
from .martens import MartensHessianFree

__all__ = ["HessianFree", "MartensHessianFree"]
