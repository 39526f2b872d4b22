"""Curvature quantities by BackPACK: what `backend="backpack"` computes.

Each result is compared with torch.func on one random product (a diagonal: on a few entries), so
that a model which BackPACK misreads is refused. docs/backpack.md lists the modules and losses each
extension supports, and what a refusal (UnsupportedError, a ValueError) names: a module, loss or
setting, and the remedy. Source of all: Dangel et al. 2020 (arXiv:1912.10985).
"""

import math

import torch
from backpack import extensions
from torch import Tensor

from ..backward.likelihoods import likelihood_of
from ..operators import Diagonal, Kronecker
from ..problem import Block, Problem
from ..truths.low_rank_terms import LowRankTerms
from . import guard
from .factors import input_factor, matrix_layer, shared_shift
from .run import run
from .support import INSTEAD, Extension

Labels = torch.Generator | None


def ggn(problem: Problem, block: Block) -> LowRankTerms:
    """GGN block mean_n V_n V_nᵀ from BackPACK's SqrtGGNExact, V [n, c, d] for c outputs.

    Raises: ValueError for what BackPACK does not support, or roots over the problem's budget.
    """
    _check_budget(problem, block, _outputs(problem))
    found = _roots(problem, block, run(problem, block, [extensions.SqrtGGNExact()]))
    guard.check_ggn(problem, block, found.columns)
    return found


def fisher_mc(
    problem: Problem, block: Block, samples: int = 1, generator: Labels = None
) -> LowRankTerms:
    """Monte-Carlo Fisher block mean_n V_n V_nᵀ from BackPACK's SqrtGGNMC, V [n, samples, d].

    generator: for the labels; None takes a new one seeded with 0. The draws are not those of
    `exact.fisher_mc`; both have `exact.fisher` as their expectation.

    Raises: ValueError for samples < 1, a loss that belongs to no known likelihood, or as `ggn`.
    """
    drawing = _drawing(problem, extensions.SqrtGGNMC, samples)
    _check_budget(problem, block, samples + math.ceil(_outputs(problem) / problem.n))
    first = extensions.SqrtGGNExact(subsampling=[0])  # labels are random: the guard needs a root
    found = run(problem, block, [first, drawing], _given(problem, generator))
    root = block.join(found[first.savefield]).flatten(0, 1)
    guard.check_ggn(problem, block, root, examples=1)
    return _roots(problem, block, {drawing.savefield: found[drawing.savefield]})


def empirical_fisher(problem: Problem, block: Block) -> LowRankTerms:
    """Second moment mean_n g_n g_nᵀ of the data's own gradients, from BackPACK's BatchGrad.

    Any loss will do, and any module around the block's own.

    Raises: ValueError for what BackPACK does not support, or gradients over the problem's budget.
    """
    _check_budget(problem, block, 1)
    found = run(problem, block, [extensions.BatchGrad()])["grad_batch"]
    g = problem.n * block.join(found)  # BackPACK's are of the terms of the batch mean, g_n / n
    guard.check_gradients(problem, block, g)
    return LowRankTerms(g[:, None, :], factor_sizes=_factor_sizes(block))


def diag_hessian(problem: Problem, block: Block) -> Diagonal:
    """Diagonal of the Hessian block from BackPACK's DiagHessian.

    Raises: ValueError for what BackPACK does not support.
    """
    found = block.join(run(problem, block, [extensions.DiagHessian()])["diag_h"])
    guard.check_diagonal(problem, block, found, "hessian")
    return Diagonal(found)


def diag_ggn(problem: Problem, block: Block) -> Diagonal:
    """Diagonal of the GGN block from BackPACK's DiagGGNExact.

    Raises: ValueError for what BackPACK does not support.
    """
    found = block.join(run(problem, block, [extensions.DiagGGNExact()])["diag_ggn_exact"])
    guard.check_diagonal(problem, block, found, "ggn")
    return Diagonal(found)


def diag_fisher_mc(
    problem: Problem, block: Block, samples: int = 1, generator: Labels = None
) -> Diagonal:
    """Diagonal of the Monte-Carlo Fisher block from BackPACK's DiagGGNMC; labels as `fisher_mc`.

    Raises: ValueError for samples < 1, a loss that belongs to no known likelihood, or what
    BackPACK does not support.
    """
    drawing = _drawing(problem, extensions.DiagGGNMC, samples)
    found = run(problem, block, [extensions.DiagGGNExact(), drawing], _given(problem, generator))
    guard.check_diagonal(problem, block, block.join(found["diag_ggn_exact"]), "ggn")
    return Diagonal(block.join(found["diag_ggn_mc"]))


def kfac(problem: Problem, block: Block, samples: int = 1, generator: Labels = None) -> Kronecker:
    """KFAC with sampled labels, from BackPACK's KFAC: G [out, out] ⊗ A [in+1, in+1] on [W, b].

    Labels as `fisher_mc`; the expectation over them is `kflr`.

    Raises: ValueError as `diag_fisher_mc`, or for a block that is not one Linear or Conv layer.
    Source: Martens and Grosse 2015 (arXiv:1503.05671), extended to convolutions by BackPACK.
    """
    drawing = _drawing(problem, extensions.KFAC, samples)
    return _kronecker(problem, block, drawing, _given(problem, generator))


def kflr(problem: Problem, block: Block) -> Kronecker:
    """KFLR, from BackPACK's KFLR; see `approximations.kflr`."""
    return _kronecker(problem, block, extensions.KFLR())


def kfra(problem: Problem, block: Block) -> Kronecker:
    """KFRA, from BackPACK's KFRA; see `approximations.kfra`."""
    return _kronecker(problem, block, extensions.KFRA())


def check_target(problem: Problem, asked_by: str, of: str) -> None:
    """Raise ValueError unless `of` is "ggn" or the "fisher" that is equal to it."""
    if of not in ("ggn", "fisher"):
        raise ValueError(f"{asked_by} approximates the 'ggn' (or the equal 'fisher'), not '{of}'")
    if of == "fisher":
        likelihood_of(problem)  # refuses a loss that has none


def _kronecker(
    problem: Problem, block: Block, extension: Extension, generator: Labels = None
) -> Kronecker:
    """BackPACK's G [out, out] ⊗ A [in+1, in+1] of the layer's inputs with 1 appended.

    At T positions of each example (a convolution) A = mean_n Σ_t a_t a_tᵀ as in Grosse and Martens
    2016 (arXiv:1602.01407), equation 32; BackPACK's G is the curvature of a shift that all
    positions share, T times theirs, hence G/T here. The bias's own tile of G/T ⊗ A is then the G
    that BackPACK gives for the bias alone.
    """
    member = matrix_layer(problem, block, extension)
    asked = shared_shift(problem, member)  # G belongs to the bias alone, at far smaller cost
    root = extensions.SqrtGGNExact()
    found = run(problem, asked, [root, extension], generator)
    guard.check_ggn(problem, asked, asked.join(found[root.savefield]).flatten(0, 1))
    G = found[extension.savefield][asked.parameters[0]][0].detach()
    A, positions = input_factor(problem, member)
    rows = slice(*member.rows) if member.rows else slice(None)
    columns = slice(*member.columns) if member.columns else slice(None)
    return Kronecker((G[rows, rows] / positions).contiguous(), A[columns, columns].contiguous())


def _roots(problem: Problem, block: Block, found: dict[str, dict[str, Tensor]]) -> LowRankTerms:
    """Mean of V_n V_nᵀ from roots [k, n, *shape], which carry the mean's 1/√n already."""
    (roots,) = found.values()
    joined = block.join({name: root.detach() for name, root in roots.items()})  # [k, n, d]
    V = problem.n**0.5 * joined.transpose(0, 1)
    return LowRankTerms(V.contiguous(), factor_sizes=_factor_sizes(block))


def _factor_sizes(block: Block) -> tuple[int, int] | None:
    member = block.single
    return member.matrix_shape if member is not None and member.w_bar else None


def _outputs(problem: Problem) -> int:
    """Number of outputs per example."""
    with torch.no_grad():
        return problem.model(problem.inputs[:1]).numel()


def _check_budget(problem: Problem, block: Block, columns: int) -> None:
    """Raise ValueError where `columns` roots per example, BackPACK's and ours, take too much."""
    parameter = problem.model.get_parameter(block.parameters[0])
    size = 2 * problem.n * columns * block.d * parameter.element_size()
    if size > problem.budget:
        raise ValueError(
            f"BackPACK's roots of block {block} take {size / 2**30:.1f} GiB ({columns} for each of "
            f"{problem.n} examples), over the budget of {problem.budget / 2**30:.1f} GiB; {INSTEAD}"
            f", or give Problem fewer examples, dtype=torch.float32 or a larger budget="
        )


def _drawing(problem: Problem, kind: Extension, samples: int) -> Extension:
    """Extension that samples labels, for a loss with a likelihood."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    likelihood_of(problem)
    return kind(mc_samples=samples)


def _given(problem: Problem, generator: Labels) -> torch.Generator:
    return generator or torch.Generator(problem.inputs.device).manual_seed(0)
