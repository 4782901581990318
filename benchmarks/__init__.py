"""Measurements, run by hand: `python -m benchmarks.scale`, `python -m benchmarks.passes`. Their tables are in the README."""
