"""Models: one dial to a shape, logits that survive a save, documents that do not see each other."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kajiya.config.compose import compose
from kajiya.config.quantities import parse_count
from kajiya.config.schema import ModelConfig
from kajiya.data.batch import Batch
from kajiya.errors import ConfigError, StoreError
from kajiya.models.build import Vocabulary, build_model
from kajiya.models.hidden import all_logits, has_split_head, last_hidden
from kajiya.models.load import load_model, stored_dtype
from kajiya.models.quantized import count_params
from kajiya.models.save import save_model
from kajiya.models.size import Shape, derive_shape, missed_words

VOCABULARY = Vocabulary(300, 0, 1, 2)
ARCHITECTURES = ("llama", "qwen3", "gpt2", "mistral", "gemma2")


def _batch(segments: list[list[int]], seed: int = 0) -> Batch:
    lengths = torch.tensor(segments)
    positions = torch.tensor([[row[:i].count(label) for i, label in enumerate(row)] for row in segments])
    tokens = torch.randint(3, 300, lengths.shape, generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, tokens, positions, lengths, tokens.numel())


@pytest.mark.parametrize("count", ["500k", "3M", "6M", "10M", "52M", "124M", "1B", "8B"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_dial_reaches_its_count(count: str, tied: bool) -> None:
    shape = derive_shape(ModelConfig(n_params=count, tied=tied), 8192)
    assert shape.n_params(8192, tied) == pytest.approx(parse_count(count, ""), rel=0.3 if count == "500k" else 0.1)
    assert shape.hidden_size % (2 * shape.n_heads) == 0
    assert shape.n_heads % shape.n_kv_heads == 0


def test_the_formula_counts_what_is_built() -> None:
    config = ModelConfig(n_params="400k", tied=False)
    built = build_model(config, VOCABULARY, 0)
    assert count_params(built.module) == derive_shape(config, 300).n_params(300, tied=False)
    assert built.derived["model.n_params"] == count_params(built.module)


def test_the_dial_of_the_long_recipe_sizes_its_model() -> None:
    config = compose("stdlib-pretrain-long")
    model = config.model
    assert derive_shape(model, config.tokenizer.vocab_size) == Shape(256, 4, 4, 4, 768)
    for count in ("3M", "20M", "100M"):
        shape = derive_shape(replace(model, n_params=count), config.tokenizer.vocab_size)
        assert shape.n_params(config.tokenizer.vocab_size, model.tied) == pytest.approx(
            parse_count(count, ""), rel=0.15
        )


def test_a_missed_dial_is_said() -> None:
    config = ModelConfig(n_params="20M", n_layers=4, hidden_size=256)
    assert missed_words(config, 7_604_480) == "20M asked for (model.hidden_size, model.n_layers set)"
    assert (
        missed_words(ModelConfig(n_params="10k"), 300_000)
        == "10k asked for (no shape comes nearer with this vocabulary)"
    )
    for near in (17_100_000, 22_900_000):
        assert missed_words(config, near) == ""
    for other in ({"path": "somewhere"}, {"name": "my.module:fn"}, {"n_params": None}):
        assert missed_words(replace(config, **other), 7_604_480) == ""


def test_what_is_set_is_kept() -> None:
    shape = derive_shape(ModelConfig(n_params="2M", n_layers=3, ffn_size=200), 300)
    assert (shape.n_layers, shape.ffn_size) == (3, 200)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_saved_model_gives_the_same_logits_in_plain_transformers(
    name: str, tmp_path: Path, small_tokenizer: Any
) -> None:
    module = build_model(ModelConfig(name=name, n_params="150k"), VOCABULARY, 0).module.eval()
    save_model(module, small_tokenizer, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = load_model(tmp_path, dtype=stored_dtype(tmp_path))
    batch = _batch([[0] * 12])
    with torch.no_grad():
        expected = all_logits(module, batch)
        torch.testing.assert_close(plain(batch.tokens).logits, expected, atol=1e-4, rtol=0)
        assert torch.equal(all_logits(ours, batch), expected)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(small_tokenizer)
    assert plain.generation_config.eos_token_id == 1


def test_tied_weights_stay_tied(tmp_path: Path, small_tokenizer: Any) -> None:
    module = build_model(ModelConfig(n_params="150k"), VOCABULARY, 0).module
    save_model(module.bfloat16(), small_tokenizer, tmp_path)
    loaded = load_model(tmp_path, dtype=stored_dtype(tmp_path))
    assert stored_dtype(tmp_path) == torch.bfloat16
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert count_params(loaded) == count_params(module)


def test_the_stored_dtype_is_that_of_the_weights_whatever_the_config_calls_it(tmp_path: Path) -> None:
    """Configs of the hub say `torch_dtype`, those that Transformers writes now say `dtype`."""
    module: Any = build_model(ModelConfig(n_params="40k"), VOCABULARY, 0).module.bfloat16()
    module.model.norm.weight.data = module.model.norm.weight.data.float()
    module.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config = json.loads((tmp_path / "config.json").read_text())
    said = config.pop("dtype")
    for more in ({"dtype": said}, {"torch_dtype": said}, {}, {"dtype": "float32"}):
        (tmp_path / "config.json").write_text(json.dumps(config | more))
        assert stored_dtype(tmp_path) == torch.bfloat16
    module.double().save_pretrained(tmp_path / "double")
    with pytest.raises(StoreError, match="stored as F64, not one of F32, BF16, F16"):
        stored_dtype(tmp_path / "double")


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2"])
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    module = build_model(ModelConfig(name=name, n_params="150k"), VOCABULARY, 0).module.eval()
    packed = _batch([[0] * 5 + [1] * 7 + [2] * 4, [0] * 16])
    with torch.no_grad():
        logits = all_logits(module, packed)
        for start, end in ((0, 5), (5, 12), (12, 16)):
            alone = module(input_ids=packed.tokens[:1, start:end], use_cache=False).logits[0]
            torch.testing.assert_close(logits[0, start:end], alone, atol=1e-5, rtol=1e-4)
        changed = Batch(packed.tokens.clone(), packed.targets, packed.positions, packed.segments, packed.n_targets)
        changed.tokens[0, :5] = 7
        moved = (all_logits(module, changed) - logits).abs().amax(dim=2)
    assert float(moved[0, :5].max()) > 0
    assert float(moved[0, 5:].max()) == 0
    assert float(moved[1].max()) == 0


def test_a_sliding_window_is_kept() -> None:
    """A row longer than the window: equal to Transformers' own eager attention, which masks by itself."""
    config = ModelConfig(name="mistral", n_params="150k", options={"sliding_window": 4})
    ours = build_model(config, VOCABULARY, 0).module.eval()
    theirs = build_model(replace(config, attention="eager"), VOCABULARY, 0).module.eval()
    batch = _batch([[0] * 12])
    with torch.no_grad():
        expected = theirs(input_ids=batch.tokens, use_cache=False).logits
        torch.testing.assert_close(all_logits(ours, batch), expected, atol=1e-5, rtol=1e-4)


def test_the_split_head_gives_the_same_logits() -> None:
    module = build_model(ModelConfig(n_params="150k"), VOCABULARY, 0).module.eval()
    assert has_split_head(module)
    batch = _batch([[0] * 9])
    with torch.no_grad():
        split = module.get_output_embeddings()(last_hidden(module, batch))  # type: ignore[operator]
        torch.testing.assert_close(split, all_logits(module, batch))


def test_random_weights_are_a_function_of_the_seed() -> None:
    one, again, other = (build_model(ModelConfig(n_params="150k"), VOCABULARY, seed).module for seed in (3, 3, 4))
    pairs = list(zip(one.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "lama"}, "did you mean 'llama'"),
        ({"options": {"attention_bais": True}}, "did you mean 'attention_bias'"),
        ({"options": {"attention_bias": 3}}, r"model.options.attention_bias: 3 is nothing.*expected bool, got int"),
        ({"options": {"hidden_act": "nothing"}}, "model.options.hidden_act: 'nothing' is nothing that llama"),
        ({"options": {"vocab_size": 3}}, "model.options.vocab_size: is the tokenizer's to say"),
        ({"name": "gpt2", "n_kv_heads": 2, "n_heads": 4, "hidden_size": 32}, "has no such size"),
        ({"path": "/nowhere/at/all"}, "cannot be loaded"),
        ({"name": "fractions:Fraction"}, "not a torch.nn.Module"),
    ],
)
def test_a_model_that_cannot_be_is_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        build_model(ModelConfig(**settings), VOCABULARY, 0)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(StoreError, match="only safetensors"):
        load_model(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, small_tokenizer: Any) -> None:
    from safetensors.torch import load_file, save_file

    save_model(build_model(ModelConfig(n_params="150k"), VOCABULARY, 0).module, small_tokenizer, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    dropped = sorted(weights)[3]
    save_file(
        {name: t for name, t in weights.items() if name != dropped}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(StoreError, match="1 missing keys"):
        load_model(tmp_path)
