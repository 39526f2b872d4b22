"""Tables of text: one class for the run's header, the report and the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import rich.table

EMPTY = "–"


@dataclass(frozen=True)
class Table:
    """Rows of text below column names; the caption says what they show.

    >>> Table("two", ["a", "b"], [["1", EMPTY], ["2", EMPTY]]).without_empty_columns()
    Table(caption='two', columns=['a'], rows=[['1'], ['2']])
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def without_empty_columns(self) -> "Table":
        """The same table less the columns whose cells are all –."""
        kept = [i for i in range(len(self.columns)) if any(row[i] != EMPTY for row in self.rows)]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Table(self.caption, [self.columns[i] for i in kept], rows)

    def as_header(self) -> dict[str, Any]:
        """The table as a run's header stores it: {"caption", "columns", "rows"}."""
        rows = [list(row) for row in self.rows]
        return {"caption": self.caption, "columns": list(self.columns), "rows": rows}

    def for_terminal(self, title: str | None = None) -> rich.table.Table:
        """The table as rich prints it."""
        shown = rich.table.Table(*self.columns, title=title, caption=self.caption or None)
        for row in self.rows:
            shown.add_row(*row)
        return shown
