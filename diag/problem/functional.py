"""Model calls with replaced parameters, and attention by its plain formula."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


def call(model: nn.Module, parameters: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Outputs of the model with these parameters, by canonical name, in place of its own.

    Shared parameters are replaced in all modules. A module under two names is visited once:
    PyTorch's own tying would leave the replacement in it.
    """
    replaced = dict(parameters)
    by_id = {id(model.get_parameter(name)): name for name in parameters}
    for prefix, module in model.named_modules():  # each module once
        for local, parameter in module.named_parameters(recurse=False):
            if id(parameter) in by_id:
                name = f"{prefix}.{local}" if prefix else local
                replaced[name] = parameters[by_id[id(parameter)]]
    return functional_call(model, replaced, (inputs,), tie_weights=False)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Context or decorator in which attention is computed by its formula.

    The fused kernels lack second, forward and batched derivatives.
    """
    layers = torch.backends.mha  # nn.MultiheadAttention and nn.TransformerEncoderLayer
    fused = layers.get_fastpath_enabled()
    layers.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        layers.set_fastpath_enabled(fused)
