"""Tokens added to a tokenizer: rows for them in the embedding and the head, each the mean of the known ones."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kajiya.config.schema import ModelConfig
from kajiya.errors import ConfigError
from kajiya.models.build import Vocabulary, build_model
from kajiya.models.load import load_model
from kajiya.models.save import save_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 10])
def test_added_tokens_begin_as_the_mean(tied: bool, spare: int, tmp_path: Path, small_tokenizer: Any) -> None:
    known, added = 300, 3
    base = build_model(ModelConfig(n_params="150k", tied=tied), Vocabulary(known + spare, 0, 1, 2), 0).module
    save_model(base, small_tokenizer, tmp_path / "base")
    config = ModelConfig(path=str(tmp_path / "base"))
    built = build_model(config, Vocabulary(known + added, 0, 1, 2, n_added=added), 0)
    assert built.derived["model.added_tokens"] == added
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        before, after = (getattr(model, layer)().weight.detach() for model in (base, built.module))
        assert len(after) == max(known + added, known + spare)
        assert torch.equal(after[:known], before[:known])
        torch.testing.assert_close(after[known : known + added], before[:known].mean(0).expand(added, -1))
    is_shared = built.module.get_input_embeddings().weight is built.module.get_output_embeddings().weight
    assert is_shared is tied
    tokens = torch.arange(20)[None]
    logits = built.module.eval()(tokens).logits
    torch.testing.assert_close(logits[..., :known], base.eval()(tokens).logits[..., :known])
    save_model(built.module, small_tokenizer, tmp_path / "grown")
    assert torch.equal(load_model(tmp_path / "grown").eval()(tokens).logits, logits)


def test_a_tokenizer_with_more_tokens_than_the_model_knows_is_refused(tmp_path: Path, small_tokenizer: Any) -> None:
    base = build_model(ModelConfig(n_params="150k"), Vocabulary(300, 0, 1, 2), 0).module
    save_model(base, small_tokenizer, tmp_path)
    with pytest.raises(ConfigError, match=r"has 300 embeddings, the tokenizer 310 tokens\n.*tokenizer.add_tokens"):
        build_model(ModelConfig(path=str(tmp_path)), Vocabulary(313, 0, 1, 2, n_added=3), 0)
