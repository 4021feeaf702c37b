"""Measurements: python -m benchmarks.NAME. Their results are in RESULTS.md beside this file."""

import os

# Set before anything imports onnxruntime, in contestants too: its official builds otherwise report what they run.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
