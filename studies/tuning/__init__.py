"""Hyper-parameter searches as Optuna studies that several processes can share."""
