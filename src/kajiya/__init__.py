"""Kajiya: a model's whole life with one typed config and one command line."""

__version__ = "0.1.0"
