"""A model called with other parameters, also where modules or parameters are shared."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call


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
