"""Layer inputs and back-propagated gradients, square-root factors and curvature products."""

from .layers import Call, Layer, layers, recording
from .likelihoods import Likelihood, likelihood_of
from .loss_roots import output_roots
from .products import block_products

__all__ = [
    "Call",
    "Layer",
    "Likelihood",
    "block_products",
    "layers",
    "likelihood_of",
    "output_roots",
    "recording",
]
