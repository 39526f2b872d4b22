"""The header of a run: versions, device, commit and configuration."""

import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("kronscope", "torch", "backpack-for-pytorch", "numpy", "scipy", "pandas", "seaborn")


def header(study: str, problem: str, device: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Header of a new run: what is needed to repeat it."""
    return {
        "study": study,
        "problem": problem,
        "status": "running",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "device": f"{device} ({platform.machine()}, {platform.system()})",
        "commit": _commit(),
        "config": dict(config),
        "metrics": {},
        "seconds": 0.0,
    }


def again(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Header of a run that goes on: its earlier one with the new settings and status.

    Its commit and date stay those it began with; those it went on with are added to "resumed".
    """
    part = {name: now[name] for name in ("created", "commit", "versions", "device")}
    begun_with = ("created", "commit", "versions", "metrics")
    kept = {name: earlier[name] for name in begun_with if name in earlier}
    resumed = [*earlier.get("resumed", []), part]
    return {**earlier, **now, **kept, "resumed": resumed}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The source's commit; empty where it is not a git checkout."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()
