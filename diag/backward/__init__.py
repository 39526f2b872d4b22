"""Layer inputs and back-propagated gradients, square-root factors and curvature products."""

from .layers import LayerCall, QualifiedLayer, layers, recording
from .likelihoods import Likelihood, likelihood_of
from .loss_roots import loss_roots
from .products import block_products

__all__ = [
    "LayerCall",
    "Likelihood",
    "QualifiedLayer",
    "block_products",
    "layers",
    "likelihood_of",
    "loss_roots",
    "recording",
]
