"""Shared by the commands: the console, parsing of numbers, printing of results."""

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()

Results = Annotated[Path, typer.Option(help="Folder for results.")]


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Numbers with commas between. Raises: ValueError for what is not a positive number."""
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (0.0,)
    if not all(0 < value < math.inf for value in values):
        raise ValueError(f"--{option} takes positive numbers with commas between, not '{text}'")
    return values


def print_results(run: Path) -> None:
    """Print the run's table and its verdicts on a paper's claims; write its report."""
    from ..reports import report
    from ..results import records
    from ..results.tables import Table

    header = records.read_header(run)
    if found := header.get("comparison"):
        console.print(Table(**found).for_terminal())
    for claim in header.get("claims", ()):
        console.print(f"- {claim}", highlight=False)
    console.print(f"report: [bold]{report.write_report(run)}[/]", soft_wrap=True)
