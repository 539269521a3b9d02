"""A tokenizer small enough to be trained on the spot."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kajiya.data.tokenizer import train_bpe


@pytest.fixture(scope="session")
def small_tokenizer() -> Any:
    texts = ["def f(x):\n    return x + 1\n", "class A:\n    pass\n"] * 20
    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(iter(texts), 300, 2), bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
