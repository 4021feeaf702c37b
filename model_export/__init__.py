"""
Export of a training run to a bundle.

Imports next to nothing, so that `model_export.bundle` needs neither torch nor onnx.
"""

import os

# Set before anything imports onnxruntime: its official builds otherwise report to their maker what they run.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
