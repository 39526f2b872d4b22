"""Scripted analyses: train, measure along the way, write tidy records, draw figures."""
