"""The `kronscope` command."""

import dataclasses
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from . import tune
from .printing import Results, console, numbers, print_results

app = typer.Typer(
    help="Exact curvature of neural networks, and how far approximations are from it.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.add_typer(tune.app, name="tune")

Seed = Annotated[int, typer.Option(help="Seed of weights and batch order.")]


def main() -> None:
    """Entry point of `kronscope`: errors in what the user gave are printed in one line."""
    try:
        app()
    except (ValueError, FileNotFoundError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)


@app.command()
def demo(
    tiny: Annotated[bool, typer.Option("--tiny", help="A run of seconds, for tests.")] = False,
    no_dashboard: Annotated[
        bool, typer.Option("--no-dashboard", help="Stop after the report.")
    ] = False,
    results: Results = Path("results"),
    port: Annotated[int, typer.Option(help="Port of the dashboard.")] = 8501,
) -> None:
    """Run the main study on built-in digits, write its report, open the dashboard."""
    run_study("error_along_training", tiny, results)
    if not no_dashboard:
        dashboard(results, port)


@app.command()
def study(
    name: Annotated[
        str,
        typer.Argument(
            help="error_along_training, optimizers_compared, equal_seconds, stability, "
            "cures, sharpness_along_training or block_hessian_free."
        ),
    ],
    tiny: Annotated[bool, typer.Option("--tiny", help="A run of seconds, for tests.")] = False,
    problem: Annotated[str | None, typer.Option(help="Training problem; see `problems`.")] = None,
    optimizers: Annotated[str | None, typer.Option(help="Names, separated by commas.")] = None,
    cures: Annotated[str | None, typer.Option(help="Candidates of the study `cures`.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of a training.")] = None,
    tune_epochs: Annotated[int | None, typer.Option(help="Epochs of a tuning run.")] = None,
    seed: Annotated[int | None, typer.Option(help="First seed (weights, batch order).")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds of each final run.")] = None,
    spares: Annotated[int | None, typer.Option(help="Extra seeds if some diverge.")] = None,
    longer: Annotated[
        int | None, typer.Option(help="SGD-momentum's epochs, as a multiple of the others'.")
    ] = None,
    lr_factors: Annotated[
        str | None, typer.Option(help="Factors of the recommended learning rate: 0.3,1,3.")
    ] = None,
    damping_factors: Annotated[
        str | None, typer.Option(help="Factors of the recommended damping: 0.1,1,10.")
    ] = None,
    adam_lr_factors: Annotated[
        str | None, typer.Option(help="Factors of Adam's learning rate (block_hessian_free).")
    ] = None,
    seconds: Annotated[
        str | None, typer.Option(help="Training times at which to compare: 60,180,600.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of each training.")] = None,
    layers_every: Annotated[
        int | None, typer.Option(help="Steps between measurements of each layer; 0: none.")
    ] = None,
    examples: Annotated[
        int | None, typer.Option(help="Training examples in each exact curvature.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes at once.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Run folder to go on with; options given change it.")
    ] = None,
    results: Results = Path("results"),
) -> None:
    """Run a study and write its report. Options that are not given are the study's own."""
    given: dict[str, Any] = {"problem": problem, "epochs": epochs, "tune_epochs": tune_epochs}
    given |= {"seed": seed, "seeds": seeds, "spares": spares, "longer": longer, "steps": steps}
    given |= {"layers_every": layers_every, "examples": examples, "workers": workers}
    given |= {"device": device, "seconds": numbers("seconds", seconds)}
    given["lr_factors"] = numbers("lr-factors", lr_factors)
    given["adam_lr_factors"] = numbers("adam-lr-factors", adam_lr_factors)
    given["damping_factors"] = numbers("damping-factors", damping_factors)
    given["optimizers"] = tuple(optimizers.split(",")) if optimizers else None
    given["cures"] = tuple(cures.split(",")) if cures else None
    chosen = {option: value for option, value in given.items() if value is not None}
    run_study(name, tiny, results, resume, **chosen)


def run_study(
    name: str, tiny: bool, results: Path, resume: Path | None = None, **changes: Any
) -> Path:
    """Run the study with progress bars, write its report, and say where it is."""
    from ..experiments import STUDIES
    from ..results import records
    from .progress import bars

    if name not in STUDIES:
        raise ValueError(f"no study '{name}'; known: {list(STUDIES)}")
    module = importlib.import_module(STUDIES[name])
    known = {field.name for field in dataclasses.fields(module.Grid)}
    if unknown := changes.keys() - known:
        raise ValueError(f"study '{name}' has no option {sorted(unknown)}; it has {sorted(known)}")
    grid, more = (module.TINY if tiny else module.Grid()), {}
    if resume is not None:
        if "resume" not in inspect.signature(module.run).parameters:
            raise ValueError(f"study '{name}' cannot go on with an earlier run")
        grid = module.Grid(**records.read_header(resume).get("config", {}))
        more = {"resume": resume}
    with bars(console) as progress:
        run = module.run(dataclasses.replace(grid, **changes), results, progress, **more)
    print_results(run)
    return run


@app.command("problems")
def list_problems() -> None:
    """List the training problems and the optimizers with recommended settings."""
    from ..problems import PROBLEMS
    from ..training.optimizers import OPTIMIZERS, UNTUNED

    table = Table("problem", "batch", "epochs", "optimizers", "what")
    for column in table.columns:  # a name or a list of widths in one line, or whole in several
        column.overflow = "fold"
    table.columns[0].no_wrap, table.columns[3].max_width = True, len("block_hessian_free")
    for name, problem in sorted(PROBLEMS.items()):
        own = problem.optimizers
        some = "all" if set(OPTIMIZERS) - set(UNTUNED) <= set(own) else ", ".join(own)
        table.add_row(name, str(problem.batch_size), str(problem.epochs), some, problem.summary)
    table.caption = "optimizers: with recommended settings; *-small: for tests, without files"
    console.print(table)


@app.command()
def train(
    problem: Annotated[str | None, typer.Argument(help="Training problem; see `problems`.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="kbfgs unless given.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs; the problem's unless given.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and batch order; 0.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    damping: Annotated[float | None, typer.Option(help="Damping λ.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="The problem's unless given.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu (unless given) or cuda.")] = None,
    measure: Annotated[
        float | None,
        typer.Option(help="Also measure curvature, in this share of the run's time: 0.2."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Run folder to go on with, at its own settings.")
    ] = None,
    results: Results = Path("results"),
) -> None:
    """Train a problem. Losses and a checkpoint are written after every epoch."""
    from ..experiments import train as runs
    from ..measuring.during_training import DuringTraining
    from .progress import bars

    during = None if measure is None else DuringTraining(measure)
    given: dict[str, Any] = {"optimizer": optimizer, "epochs": epochs or None, "seed": seed}
    given |= {"batch_size": batch_size, "device": device, "lr": lr, "damping": damping}
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = runs.settings(problem, chosen, resume)
    with bars(console) as progress:
        outcome = runs.train(settings, results, progress, resume, during)
    console.print(runs.table(outcome.frame).for_terminal())
    if outcome.measuring:
        console.print(outcome.measuring)
    console.print(f"run: [bold]{outcome.folder}[/]", soft_wrap=True)
    if outcome.diverged:
        console.print(f"[bold red]{outcome.diverged}[/]")
        raise typer.Exit(3)
    if outcome.stopped:
        console.print(f"stopped; go on with --resume {outcome.folder}", soft_wrap=True)
        raise typer.Exit(143)  # what a shell reports of a process that SIGTERM ended


@app.command()
def measure(
    problem: Annotated[str, typer.Argument(help="Training problem.")],
    block: Annotated[str, typer.Option(help="Layer; all of them unless given.")] = "",
    truth: Annotated[str, typer.Option(help="hessian or ggn.")] = "ggn",
    examples: Annotated[int, typer.Option(help="Training examples to measure on.")] = 256,
    checkpoint: Annotated[
        Path | None, typer.Option(help="checkpoint.pt of a `train` run; else the initial weights.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Compare approximations with the exact curvature of each layer, as a table."""
    from ..measuring.table import blocks_table

    console.print(blocks_table(problem, block, truth, examples, checkpoint, seed))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of the run, results/<run>.")],
) -> None:
    """Write a run's report and figures again from its records."""
    from ..reports.report import write_report

    if not run.is_dir():
        raise ValueError(f"no run folder {run}; runs are the folders below results/")
    console.print(f"report: [bold]{write_report(run)}[/]", soft_wrap=True)


@app.command()
def dashboard(
    results: Results = Path("results"),
    port: Annotated[int, typer.Option(help="Port to serve on.")] = 8501,
) -> None:
    """Serve the dashboard of a results folder until interrupted."""
    page = importlib.util.find_spec("kronscope.app.main")
    if page is None or page.origin is None or importlib.util.find_spec("streamlit") is None:
        raise ValueError("the dashboard needs the extra: pip install '.[app]' in the checkout")
    console.print(f"dashboard: [bold]http://localhost:{port}[/] (stop with Ctrl-C)")
    flags = ["--server.headless=true", f"--server.port={port}", "--browser.gatherUsageStats=false"]
    flags += ["--server.address=localhost", "--client.toolbarMode=viewer"]
    # -P: a kronscope.py or a streamlit/ in the folder of the user is not what is meant
    command = [sys.executable, "-P", "-m", "streamlit", "run", page.origin, *flags]
    try:
        subprocess.run([*command, "--", "--results", str(results)], check=False)
    except KeyboardInterrupt:
        console.print("dashboard stopped")


@app.command()
def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="exact: a dense block, against other packages; scale: all layers of the papers' "
            "networks; step: each optimizer's step over SGD-momentum's; hf: a CG iteration over "
            "such a step; loading: the share of a step spent on loading."
        ),
    ],
) -> None:
    """Time Kronscope against peers, in one run on this machine."""
    from ..bench import BENCHES

    if name not in BENCHES:
        raise ValueError(f"no bench '{name}'; known: {list(BENCHES)}")
    console.print(BENCHES[name]())


if __name__ == "__main__":
    main()
