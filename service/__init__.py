"""The service: answers POST /classify from a bundle, stopping each image at the first expert that is sure enough."""

import os

__version__ = "0.2.0"

# Set before anything imports onnxruntime: its official builds otherwise report to their maker what they run.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
