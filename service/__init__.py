"""The service: answers POST /classify from a bundle, stopping each image at the first expert that is sure enough."""

import os

__version__ = "0.2.0"

# Before anybody imports onnxruntime, whose official builds else report what they run to their maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
