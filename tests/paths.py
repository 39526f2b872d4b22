"""Where the checkout, its documents and the reference files of the tests are."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REFERENCE = ROOT / "tests" / "reference"
