"""A tokenizer small enough to be trained on the spot, and bases for adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.training.conftest import VOCABULARY, NoTokenizer
from transformers import PreTrainedTokenizerFast

from kajiya.config.schema import ModelConfig
from kajiya.data.tokenizer import train_bpe
from kajiya.models.build import build_model
from kajiya.models.save import save_model


@pytest.fixture(scope="session")
def small_tokenizer() -> Any:
    texts = ["def f(x):\n    return x + 1\n", "class A:\n    pass\n"] * 20
    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(iter(texts), 300, 2), bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )


@pytest.fixture
def base(tmp_path: Path) -> Callable[..., Path]:
    """`base(tied=False, seed=0, name="llama")`: the folder of a random model, the same shapes for every seed."""

    def make(tied: bool = False, seed: int = 0, name: str = "llama") -> Path:
        folder = tmp_path / "-".join(["base", str(tied), str(seed), *([] if name == "llama" else [name])])
        sizes = {"n_params": None, "hidden_size": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_size": 64}
        options = {"num_local_experts": 3} if name == "mixtral" else {}
        settings: Any = {**sizes, "name": name, "max_positions": 64, "tied": tied, "options": options}
        save_model(build_model(ModelConfig(**settings), VOCABULARY, seed).module, NoTokenizer(), folder)
        return folder

    return make
