"""Files of a run (records, header, provenance), its tables, and checks of its options."""

from . import options, provenance, records, runs, tables

__all__ = ["options", "provenance", "records", "runs", "tables"]
