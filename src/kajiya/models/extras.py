"""Packages that some ways of storing weights need."""

import logging
from typing import Any

from kajiya.errors import MissingExtraError


def require_bitsandbytes(purpose: str) -> Any:
    """The package bitsandbytes. Raises `MissingExtraError`, which names what it is for."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "quant", purpose) from error
    # It says at every product that LLM.int8 reads activations in 16 bits.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return bitsandbytes
