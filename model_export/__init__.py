"""
Export of a training run to a bundle.

Imports next to nothing, so that `model_export.bundle` needs neither torch nor onnx.
"""

import os

# Before anybody imports onnxruntime, whose official builds else report what they run to their maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
