"""Measurements: python -m benchmarks.NAME. Their results are in RESULTS.md beside this file."""
