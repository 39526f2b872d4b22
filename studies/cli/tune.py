"""The commands `kronscope tune grid`, `kronscope tune searched` and `kronscope tune halving`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .printing import Results, console, numbers, print_results

if TYPE_CHECKING:
    from ..tuning.searches import Search

app = typer.Typer(
    help="Search for the lr and damping, or what the papers tuned, with the least training loss.",
    no_args_is_help=True,
)

Tuned = Annotated[str, typer.Argument(help="Training problem.")]
Optimizer = Annotated[str | None, typer.Option(help="kbfgs unless given; see `problems`.")]
Epochs = Annotated[int | None, typer.Option(help="Of a training; the problem's unless given.")]
SameSeed = Annotated[int | None, typer.Option(help="Of initialisation, batches and draws.")]
Workers = Annotated[int | None, typer.Option(help="Trainings at once; 2 unless given.")]
Where = Annotated[str | None, typer.Option(help="Where it trains: cpu (unless given) or cuda.")]
GoOn = Annotated[
    Path | None, typer.Option(help="Search to go on with: its settings, those given over them.")
]


@app.command("grid")
def grid(
    problem: Tuned,
    optimizer: Optimizer = None,
    epochs: Epochs = None,
    seed: SameSeed = None,
    lr_factors: Annotated[
        str | None, typer.Option(help="Times the recommended lr, with commas between.")
    ] = None,
    damping_factors: Annotated[
        str | None, typer.Option(help="Times the recommended damping, with commas between.")
    ] = None,
    workers: Workers = None,
    device: Where = None,
    resume: GoOn = None,
    results: Results = Path("results"),
) -> None:
    """Train every combination of an lr and a damping, around the recommended, to the end."""
    from ..tuning.searches import Grid

    given: dict[str, Any] = {"optimizer": optimizer, "epochs": epochs, "seed": seed}
    given |= {"workers": workers, "device": device, **_factors(lr_factors, damping_factors)}
    _search(Grid, problem, given, resume, results)


@app.command("searched")
def searched(
    problem: Tuned,
    optimizer: Optimizer = None,
    epochs: Epochs = None,
    seed: SameSeed = None,
    workers: Workers = None,
    device: Where = None,
    resume: GoOn = None,
    results: Results = Path("results"),
) -> None:
    """Train every combination that the problem lists: what the papers tuned, as far as known."""
    from ..tuning.searches import Listed

    given: dict[str, Any] = {"optimizer": optimizer, "epochs": epochs, "seed": seed}
    given |= {"workers": workers, "device": device}
    _search(Listed, problem, given, resume, results)


@app.command("halving")
def halving(
    problem: Tuned,
    optimizer: Optimizer = None,
    epochs: Epochs = None,
    trials: Annotated[int | None, typer.Option(help="Points drawn; 24 unless given.")] = None,
    seed: SameSeed = None,
    lr_factors: Annotated[
        str | None, typer.Option(help="Least and largest, times the recommended lr.")
    ] = None,
    damping_factors: Annotated[
        str | None, typer.Option(help="Least and largest, times the recommended damping.")
    ] = None,
    workers: Workers = None,
    device: Where = None,
    resume: GoOn = None,
    results: Results = Path("results"),
) -> None:
    """Draw lr and damping at random and stop the worse trainings early."""
    from ..tuning.searches import Halving

    given: dict[str, Any] = {"optimizer": optimizer, "epochs": epochs, "seed": seed}
    given |= {"workers": workers, "device": device, "trials": trials}
    given |= _factors(lr_factors, damping_factors)
    _search(Halving, problem, given, resume, results)


def _factors(lr: str | None, damping: str | None) -> dict[str, Any]:
    return {
        "lr_factors": numbers("lr-factors", lr),
        "damping_factors": numbers("damping-factors", damping),
    }


def _search(
    search: "type[Search]",
    problem: str,
    given: dict[str, Any],
    resume: Path | None,
    results: Path,
) -> None:
    """Search with progress bars, print the best and write the report."""
    from ..results import records
    from ..tuning import queue
    from .progress import bars

    chosen = {name: value for name, value in given.items() if value is not None}
    known = {field.name for field in dataclasses.fields(search)}
    earlier = records.read_header(resume).get("config", {}) if resume else {}
    earlier = {name: value for name, value in earlier.items() if name in known}
    chosen = {**earlier, "problem": problem, **chosen}
    with bars(console) as progress:
        run = queue.run(search(**chosen), results, progress, resume)
    print_results(run)
