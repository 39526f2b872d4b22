"""The commands `kronscope tune grid`, `kronscope tune searched` and `kronscope tune halving`."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from .printing import Results, console, numbers, print_results

app = typer.Typer(
    help="Search for the hyper-parameters with the least training loss.", no_args_is_help=True
)


def _optional(kind: type, text: str) -> Any:
    return Annotated[kind | None, typer.Option(help=text)]


SHARED = {
    "optimizer": _optional(str, "Optimizer, as `kronscope problems` lists them; default: kbfgs."),
    "epochs": _optional(int, "Epochs of one training; default: the problem's."),
    "seed": _optional(int, "Seed of initialisation, batches and draws; default: 0."),
    "workers": _optional(int, "Trainings at the same time; default: 2."),
    "device": _optional(str, "cpu (default) or cuda."),
    "resume": _optional(
        Path, "Run folder to go on with, also one at work; its settings are the defaults."
    ),
}
FACTORS = {
    "lr_factors": _optional(str, "Factors of the recommended lr, separated by commas."),
    "damping_factors": _optional(str, "Factors of the recommended damping, separated by commas."),
}
RANGES = {
    "trials": _optional(int, "Number of points; default: 24."),
    "lr_factors": _optional(str, "Smallest,largest factor of the recommended lr."),
    "damping_factors": _optional(str, "Smallest,largest factor of the recommended damping."),
}


def _register(name: str, search: str, own: dict[str, Any], text: str) -> None:
    """Make a command of a class of `tuning.searches`; own: its options beside the shared ones."""

    def command(**given: Any) -> None:
        _search(search, **given)

    kind = inspect.Parameter.KEYWORD_ONLY
    problem = Annotated[str, typer.Argument(help="Training problem.")]
    options = (SHARED | own).items()
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("problem", kind, annotation=problem),
            *(inspect.Parameter(n, kind, default=None, annotation=a) for n, a in options),
            inspect.Parameter("results", kind, default=Path("results"), annotation=Results),
        ]
    )
    app.command(name, help=text)(command)


_register("grid", "Grid", FACTORS, "Train all combinations of lr and damping on a grid.")
_register("searched", "Listed", {}, "Train all combinations of the values that the papers tuned.")
_register("halving", "Halving", RANGES, "Sample lr and damping and stop the worse trainings early.")


def _search(kind: str, problem: str, resume: Path | None, results: Path, **given: Any) -> None:
    """Search with progress bars, print the best settings and write the report."""
    from ..results import records
    from .progress import bars

    try:
        from ..tuning import run, searches
    except ImportError as error:
        lacks = "tuning needs the extra: pip install '.[tune]' in the checkout"
        raise ValueError(lacks) from error
    for name in given.keys() & FACTORS.keys():
        given[name] = numbers(name.replace("_", "-"), given[name])
    search = getattr(searches, kind)
    known = {field.name for field in fields(search)}
    earlier = records.read_header(resume).get("config", {}) if resume else {}
    chosen = {name: value for name, value in earlier.items() if name in known}
    chosen |= {name: value for name, value in given.items() if value is not None}
    with bars(console) as progress:
        folder = run.run(search(**chosen | {"problem": problem}), results, progress, resume)
    print_results(folder)
