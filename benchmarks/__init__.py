"""Measurements: python -m benchmarks.NAME. Their results are in RESULTS.md beside this file."""

import os

# Before anybody imports onnxruntime, contestants too; its official builds else report what they run to their maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
