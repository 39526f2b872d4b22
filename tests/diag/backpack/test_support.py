"""The support matrix in docs/backpack.md, computed: what BackPACK does with each module and loss.

Every extension runs on every network twice: bare, as BackPACK's own documentation says, and through
diag.crosscheck. What either returns is held against dense definitions.
"""

import copy
import os
import warnings
from importlib.metadata import version
from pathlib import Path

import backpack.extensions
import pytest
import torch
from backpack import backpack as running
from backpack import extend

from kronscope.diag import Problem, dense
from kronscope.diag.backpack import quantities as crosscheck
from tests.diag.backpack.definitions import LAYERS, Definitions, kron
from tests.diag.backpack.networks import LOSSES, MODULES, WIRINGS, randomised
from tests.paths import DOCS, ROOT

PAGE = DOCS / "backpack.md"
REWRITE = "KRONSCOPE_WRITE_DOCS"
TABLES = {
    "module": MODULES,
    "forward": WIRINGS,
    "loss": LOSSES,
}
SAMPLES = 2
TOLERANCE = 1e-8  # of the largest entry: float64 rounding after some hundred products, with room

# extension -> its front end
FRONT = {
    "SqrtGGNExact": crosscheck.ggn,
    "SqrtGGNMC": crosscheck.fisher_mc,
    "BatchGrad": crosscheck.empirical_fisher,
    "DiagHessian": crosscheck.diag_hessian,
    "DiagGGNExact": crosscheck.diag_ggn,
    "DiagGGNMC": crosscheck.diag_fisher_mc,
    "KFAC": crosscheck.kfac,
    "KFLR": crosscheck.kflr,
    "KFRA": crosscheck.kfra,
}
SAMPLED = ("SqrtGGNMC", "DiagGGNMC", "KFAC")

BEGIN, END = "<!-- computed: begin -->\n", "<!-- computed: end -->"


def seed_of(generator):
    """The seed that the engine takes from a generator."""
    return int(torch.randint(2**62, (), generator=generator))


def agree(found, expected):
    scale = expected.abs().max()
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= TOLERANCE * scale
    )


def bare(problem, extension, seed):
    """{parameter: what BackPACK saves there}, used as its documentation says."""
    keywords = {"mc_samples": SAMPLES} if extension in SAMPLED else {}
    made = getattr(backpack.extensions, extension)(**keywords)
    model, loss = copy.deepcopy(problem.model).requires_grad_(True), copy.deepcopy(problem.loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = extend(model)
        loss = extend(loss) if isinstance(loss, torch.nn.Module) else loss
        torch.manual_seed(seed)
        value = loss(model(problem.inputs), problem.targets)
        with running(made):
            value.backward()
    named = model.named_parameters()
    return {n: getattr(p, made.savefield) for n, p in named if hasattr(p, made.savefield)}


def assembled(extension, quantity, n, T):
    """The matrix that a bare quantity of one parameter stands for."""
    if extension.startswith("K"):
        factors = [quantity[0] / T, *quantity[1:]] if len(quantity) == 2 else quantity
        return factors[0] if len(factors) == 1 else kron(*factors)
    quantity = quantity.detach()
    if extension.startswith("Diag"):
        return torch.diag(quantity.flatten())
    if extension == "BatchGrad":
        g = n * quantity.flatten(1)
        return g.T @ g / n
    V = quantity.flatten(0, 1).flatten(1)
    return V.T @ V


def computes_wrongly(problem, definitions, extension, seed):
    """Whether bare BackPACK returns, without complaint, a matrix that is not the right one."""
    try:
        quantities = bare(problem, extension, seed)
    except (RuntimeError, ValueError, AttributeError, AssertionError, TypeError):
        return False
    for name, quantity in quantities.items():
        layer, block = problem.model.get_submodule(name.rpartition(".")[0]), problem.block(name)
        T = 1
        if extension.startswith("K"):
            if not isinstance(layer, LAYERS):
                continue  # of a transposed convolution: factors of another matrix
            T = definitions.inputs(block)[1]
        if not agree(assembled(extension, quantity, problem.n, T), definitions(extension, block)):
            return True
    return False


def given(problem, definitions, extension, layer):
    """Whether the front end returns the block; what it returns must be right."""
    generator = torch.Generator().manual_seed(3)
    keywords = {"samples": SAMPLES, "generator": generator} if extension in SAMPLED else {}
    block = problem.block(layer)
    try:
        found = FRONT[extension](problem, block, **keywords)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert " use " in refusal or " work for " in refusal  # the way out
        return False
    assert agree(dense(found), definitions(extension, block)), (extension, layer)
    return True


def cell(network, problem, definitions, extension):
    answers = [given(problem, definitions, extension, layer) for layer in network.layers]
    seed = seed_of(torch.Generator().manual_seed(3))
    if all(answers):
        return "yes"
    if computes_wrongly(problem, definitions, extension, seed):
        return "wrong"
    return "others" if any(answers) else "error"


def row(make):
    torch.manual_seed(0)
    network = make()
    randomised(network.model)
    problem = Problem(network.model, network.loss, network.inputs, network.targets)
    seed = seed_of(torch.Generator().manual_seed(3))
    definitions = Definitions(problem, SAMPLES, seed)
    return [cell(network, problem, definitions, extension) for extension in FRONT]


def table(title, rows):
    head = [f"| {title} | {' | '.join(FRONT)} |", "| --- |" + " --- |" * len(FRONT)]
    body = [f"| {label} | {' | '.join(cells)} |" for label, cells in rows.items()]
    return "\n".join([*head, *body]).replace("| wrong", "| **wrong**")


def written(title, label):
    """The page's row of this label in the table of this title."""
    (own,) = PAGE.read_text(encoding="utf-8").split(f"| {title} |")[1:]
    (line,) = [line for line in own.splitlines() if line.startswith(f"| {label} |")]
    return line.replace("**", "").strip("| ").split(" | ")[1:]


FEW = [("module", "Linear"), ("module", "Conv2d(groups=2)"), ("module", "GELU")]
FEW += [("forward", next(iter(WIRINGS))), ("loss", next(iter(LOSSES)))]


@pytest.mark.parametrize(("title", "label"), FEW)
def test_some_rows_say_what_backpack_does(title, label):
    assert row(TABLES[title][label]) == written(title, label)


@pytest.mark.slow
def test_the_page_says_what_backpack_does():
    rows = {t: {label: row(m) for label, m in own.items()} for t, own in TABLES.items()}
    found = [cell for own in rows.values() for cells in own.values() for cell in cells]
    assert len(found) >= 70 * len(FRONT)
    assert set(found) == {"yes", "others", "error", "wrong"}
    tables = "\n\n".join(table(title, own) for title, own in rows.items())
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    computed, end, after = rest.partition(END)
    assert end, f"{PAGE.name} has lost its mark {END}"
    made = f"BackPACK {version('backpack-for-pytorch')}:\n\n{tables}\n"
    if os.environ.get(REWRITE):
        PAGE.write_text(before + BEGIN + made + END + after, encoding="utf-8")
    again = f"{REWRITE}=1 python -m pytest {Path(__file__).relative_to(ROOT)}; git diff docs"
    assert computed == made, f"BackPACK does not do what docs/{PAGE.name} says; see what: {again}"
