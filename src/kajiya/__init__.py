"""Kajiya: a model's whole life with one typed config and one command line."""

from kajiya.api import compose, evaluate, load, train, use_adapter

__version__ = "0.1.0"
__all__ = ["__version__", "compose", "evaluate", "load", "train", "use_adapter"]
