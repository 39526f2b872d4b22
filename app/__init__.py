"""The dashboard: pages over the records of a results folder; they compute nothing."""
