"""The tiny models of other rooms' tests."""

from tests.models.conftest import base, small_tokenizer
from tests.training.conftest import tiny_model

__all__ = ["base", "small_tokenizer", "tiny_model"]
