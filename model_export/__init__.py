"""Export of a training run to a bundle. Import-free, so that `model_export.bundle` needs neither torch nor onnx."""
