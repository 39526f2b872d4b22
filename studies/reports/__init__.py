"""Figures, tables and the report of a run, made from its records."""

from . import figures, report, summaries

__all__ = ["figures", "report", "summaries"]
