"""Benchmarks: run times as ratios to a peer that is timed in the same run."""

from . import exact, hessian_free, loading, scale, step

BENCHES = {
    "exact": exact.exact,
    "scale": scale.scale,
    "step": step.step,
    "hf": hessian_free.hessian_free,
    "loading": loading.loading,
}

__all__ = ["BENCHES"]
