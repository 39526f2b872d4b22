"""BackPACK, the second and independent engine, on a deep copy (its hooks break torch.func)."""

import copy
import warnings

from torch import Tensor, nn

from diag.blocks import Block
from diag.operators import LowRank
from diag.problem import Problem


def ggn(problem: Problem, block: Block) -> LowRank:
    """GGN block V Vᵀ/n from BackPACK's SqrtGGNExact, V [d, n·c].

    Raises: ValueError naming a module or loss that BackPACK does not support, with the remedy.
    Source: Dangel et al. 2020 (arXiv:1912.10985).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BackPACK warns of PyTorch's own deprecations
        from backpack import backpack, extend
        from backpack.extensions import SqrtGGNExact

        model, loss = copy.deepcopy(problem.model), copy.deepcopy(problem.loss)
        if not isinstance(loss, nn.Module):
            raise ValueError(
                "backend='backpack' needs the loss as a module (nn.MSELoss, nn.CrossEntropyLoss, "
                "nn.BCEWithLogitsLoss), not a function; use backend='torch.func'"
            )
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        try:
            value = extend(loss)(extend(model)(problem.inputs), problem.targets)
            with backpack(SqrtGGNExact()):
                value.backward()
        except (NotImplementedError, RuntimeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"BackPACK cannot compute the GGN of this problem ({error}); modules: "
                f"{_leaf_types(model)}, loss {type(loss).__name__}; use backend='torch.func'"
            ) from error
    return LowRank(_square_root(model, block))


def _square_root(model: nn.Module, block: Block) -> Tensor:
    """V [d, c·n] in the block's order from the .sqrt_ggn_exact [c, n, *shape] of its parameters.

    BackPACK's roots carry the mean's 1/√n already: V Vᵀ is the block.
    """
    roots = {}
    for name in block.parameters:
        parameter = model.get_parameter(name)
        if not hasattr(parameter, "sqrt_ggn_exact"):
            owner = model.get_submodule(name.rpartition(".")[0])
            raise ValueError(
                f"BackPACK has no GGN for parameter '{name}' of a {type(owner).__name__}; "
                f"use backend='torch.func'"
            )
        roots[name] = parameter.sqrt_ggn_exact.detach()
    joined = block.join(roots)  # [c, n, d]
    return joined.reshape(-1, joined.shape[-1]).T.contiguous()


def _leaf_types(model: nn.Module) -> list[str]:
    leaves = [m for m in model.modules() if not any(True for _ in m.children())]
    return sorted({type(m).__name__ for m in leaves})
