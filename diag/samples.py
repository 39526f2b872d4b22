"""The per-example terms of a layer's block, for methods built from them."""

from torch import Tensor

from diag.blocks import Block
from diag.exact import truth
from diag.problem import Problem
from diag.sample_mean import SampleMean

__all__ = ["SampleMean", "layer_terms", "sample_truth"]


def layer_terms(problem: Problem, block: Block, of: str = "ggn") -> tuple[Tensor, Tensor]:
    """The terms of a layer's exact block: a [n, in+1] and C [n, out, out].

    Raises: ValueError for a block that is not a Linear layer with one row per example.
    """
    terms = sample_truth(problem, block, of, "layer_terms")
    return terms.a, terms.C


def sample_truth(problem: Problem, block: Block, of: str, asked_by: str) -> SampleMean:
    """The truth named `of` as a SampleMean, for methods that need its terms.

    Raises: ValueError naming the block, the method and the reason where there are no such terms.
    """
    found = truth(problem, block, of)
    if not isinstance(found, SampleMean):
        kinds = [type(problem.model.get_submodule(m.module)).__name__ for m in block.members]
        raise ValueError(
            f"{asked_by} needs a Linear layer called once with one row per example; block "
            f"'{block.name}' is {' + '.join(kinds)} without such rows; diagonal, layer_blocks and "
            f"the exact truths work for every block"
        )
    return found
