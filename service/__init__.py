"""The service: answers POST /classify from a bundle, stopping each image at the first expert that is sure enough."""

__version__ = "0.2.0"
