"""A model called with other parameters, also where modules or parameters are shared; attention."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


def call(model: nn.Module, parameters: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Outputs of the model with these parameters in place of its own, by canonical name.

    A parameter that several modules share is replaced in all of them. A module that stands under
    two names is visited once: PyTorch's own tying would visit it twice, and put the replacement
    back in place of the parameter when it is done.
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
    """Within, or as a decorator: attention by its formula, as it was chosen before afterwards.

    The fused kernels have no second or forward derivatives, and none of many directions at once.
    """
    layers = torch.backends.mha  # nn.MultiheadAttention and nn.TransformerEncoderLayer
    fused = layers.get_fastpath_enabled()
    layers.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        layers.set_fastpath_enabled(fused)
