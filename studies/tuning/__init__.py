"""Searches for learning rate and damping."""
