"""Virtual tokens before whole texts that a head judges, and in encoder–decoders: what PEFT computes, padded or not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tests.training.conftest import VOCABULARY, NoTokenizer, make_examples, make_pairs_of_text, random_sequences

from kajiya.config.schema import AdapterConfig, ModelConfig
from kajiya.errors import ConfigError, StoreError
from kajiya.models.adapt import adapter_off, transform
from kajiya.models.adapter_files import Base, load_adapter, save_adapter
from kajiya.models.build import Vocabulary, build_model
from kajiya.models.load import load_model
from kajiya.models.open import open_model
from kajiya.models.outputs import seq2seq_logits, sequence_logits
from kajiya.models.tasks import Task
from kajiya.models.virtual_tokens import cache_argument
from kajiya.models.weights_digest import weights_digest

# PEFT asks a model for what newer Transformers call otherwise.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]
KINDS = pytest.mark.parametrize("kind", ["prefix", "prompt"])
CLASSES = Task("classes", ("a", "b", "c"))
SEQ2SEQ = Task("seq2seq")
N_VIRTUAL = 3


def _base(folder: Path, architecture: str, task: Task) -> Path:
    made: Any = build_model(
        ModelConfig(name=architecture, n_params="40k", max_positions=64), VOCABULARY, 0, task
    ).module
    made.save_pretrained(folder / "base")
    return folder / "base"


def _trained(base: Path, kind: str, task: Task) -> Any:
    """With virtual tokens and head somewhere behind their beginning."""
    module = load_model(base, task=task)
    transform(module, AdapterConfig(kind, {"n_tokens": N_VIRTUAL}), "none", seed=5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


def _saved(module: Any, folder: Path, base: Path, task: Task) -> Path:
    save_adapter(module, NoTokenizer(), folder / "a", Base(str(base), weights_digest(base), "none", task.labels))
    return folder / "a"


@KINDS
@pytest.mark.parametrize(
    ("architecture", "task"),
    [("llama", CLASSES), ("gpt2", Task("score")), ("opt", CLASSES)],
    ids=lambda each: str(each),
)
def test_a_head_reads_the_last_token_behind_them_as_peft_does(
    kind: str, architecture: str, task: Task, tmp_path: Path
) -> None:
    base = _base(tmp_path, architecture, task)
    module = _trained(base, kind, task)
    trained = {name for name, each in module.named_parameters() if each.requires_grad}
    assert trained == {"score.modules_to_save.default.weight", "virtual_tokens.embedding.weight"}
    sequences = random_sequences(5, seed=1, shortest=2, longest=11)
    batch = make_examples(sequences, k=1)
    adapter = _saved(module, tmp_path, base, task)
    plain = load_model(base, task=task, attention="eager")
    peft: Any = PeftModel.from_pretrained(load_model(base, task=task, attention="eager"), adapter).eval()
    again = open_model(adapter, torch.float32)
    with torch.no_grad():
        found = sequence_logits(module, batch)
        assert torch.equal(sequence_logits(again, batch), found)
        for number, (ids, _) in enumerate(sequences):
            given = {"input_ids": torch.tensor([ids[:-1]])}
            if kind == "prefix":
                # PEFT looks for `past_key_values`, which newer Transformers call `cache`; what it would give is this.
                mask = torch.ones(1, N_VIRTUAL + len(ids) - 1, dtype=torch.int64)
                cache = {cache_argument(plain): peft.get_prompt(1)}
                expected = peft.get_base_model()(**given, **cache, attention_mask=mask).logits
            else:
                expected = peft(**given, attention_mask=torch.ones_like(given["input_ids"])).logits
            torch.testing.assert_close(found[number], expected[0], atol=1e-5, rtol=1e-4)
        with adapter_off(module):
            torch.testing.assert_close(sequence_logits(module, batch), sequence_logits(plain, batch))
        assert torch.equal(sequence_logits(module, batch), found)


def _uneven(base: Path, architecture: str) -> None:
    """A decoder of another depth than the encoder and, where the architecture knows it, heads of another width than D / heads."""
    model: Any = load_model(base, task=SEQ2SEQ)
    config = model.config
    depth = "num_decoder_layers" if architecture == "t5" else "decoder_layers"
    setattr(config, depth, 1 + getattr(config, depth))
    if architecture == "t5":
        config.d_kv = 12
    torch.manual_seed(1)
    type(model)(config).save_pretrained(base)


@KINDS
@pytest.mark.parametrize("is_uneven", [False, True])
@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_an_encoder_decoder_has_them_where_peft_has(
    kind: str, is_uneven: bool, architecture: str, tmp_path: Path
) -> None:
    base = _base(tmp_path, architecture, SEQ2SEQ)
    if is_uneven:
        _uneven(base, architecture)
    module = _trained(base, kind, SEQ2SEQ)
    assert [name for name, each in module.named_parameters() if each.requires_grad] == [
        "virtual_tokens.embedding.weight"
    ]
    batch = make_pairs_of_text(3, 0)
    adapter = _saved(module, tmp_path, base, SEQ2SEQ)
    peft: Any = PeftModel.from_pretrained(load_model(base, task=SEQ2SEQ, attention="eager"), adapter).eval()
    again = open_model(adapter, torch.float32)
    with torch.no_grad():
        found = seq2seq_logits(module, batch)
        expected = peft(
            input_ids=batch.inputs, attention_mask=batch.inputs_mask.long(), decoder_input_ids=batch.tokens
        ).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(seq2seq_logits(again, batch), found)
        with adapter_off(module):
            plain = seq2seq_logits(module, batch)
        torch.testing.assert_close(plain, seq2seq_logits(load_model(base, task=SEQ2SEQ), batch))
        assert (plain - found).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("architecture", "task", "use", "config"),
    [
        ("t5", SEQ2SEQ, "SEQ_2_SEQ_LM", PromptTuningConfig),
        ("t5", SEQ2SEQ, "SEQ_2_SEQ_LM", PrefixTuningConfig),
        ("llama", CLASSES, "SEQ_CLS", PromptTuningConfig),
    ],
)
def test_those_that_peft_has_made_load_here(
    architecture: str, task: Task, use: str, config: Any, tmp_path: Path
) -> None:
    base = _base(tmp_path, architecture, task)
    peft: Any = get_peft_model(load_model(base, task=task), config(num_virtual_tokens=N_VIRTUAL, task_type=use))
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    peft.save_pretrained(tmp_path / "theirs")
    module = load_model(base, task=task)
    load_adapter(module, tmp_path / "theirs", is_trained=True)
    assert {name.split(".")[0] for name, each in module.named_parameters() if each.requires_grad} <= {
        "virtual_tokens",
        "score",
    }
    module, peft = module.eval(), peft.eval()
    with torch.no_grad():
        if task is SEQ2SEQ:
            batch: Any = make_pairs_of_text(3, 0)
            found = seq2seq_logits(module, batch)
            given = {"attention_mask": batch.inputs_mask.long(), "decoder_input_ids": batch.tokens}
            expected = peft(input_ids=batch.inputs, **given).logits
        else:
            ids, n_prompt = random_sequences(1, seed=1)[0]
            found = sequence_logits(module, make_examples([(ids, n_prompt)], k=1))
            expected = peft(input_ids=torch.tensor([ids[:-1]])).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_an_adapter_whose_head_the_model_lacks_is_refused(tmp_path: Path) -> None:
    base = _base(tmp_path, "llama", CLASSES)
    adapter = _saved(_trained(base, "prompt", CLASSES), tmp_path, base, CLASSES)
    (adapter / "base.json").unlink()  # as of another tool
    causal = build_model(ModelConfig(n_params="40k", max_positions=64), VOCABULARY, 0).module
    with pytest.raises(StoreError, match=r"'base_model\.score\.weight' is in the adapter or among the model's heads"):
        load_adapter(causal, adapter)


def test_a_decoder_of_unknown_sizes_takes_a_prompt_alone() -> None:
    module: Any = build_model(
        ModelConfig(name="prophetnet", n_params="60k", max_positions=64), VOCABULARY, 0, SEQ2SEQ
    ).module
    with pytest.raises(ConfigError, match="does not know the sizes of the decoder of prophetnet"):
        transform(module, AdapterConfig("prefix"), "none", 0)


@pytest.mark.parametrize(("architecture", "n_tokens"), [("llama", 2), ("llama", 3), ("llama", 8), ("gemma3_text", 8)])
def test_a_prompt_begins_as_a_text_as_peft_has_it(
    architecture: str, n_tokens: int, small_tokenizer: Any, tmp_path: Path
) -> None:
    """Gemma reads its embeddings times √D."""
    vocabulary = Vocabulary(len(small_tokenizer), 0, 1, 2)
    made: Any = build_model(ModelConfig(name=architecture, n_params="60k", max_positions=64), vocabulary, 0).module
    made.save_pretrained(tmp_path / "base")
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = "def f"
    given = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": text,
        "tokenizer_name_or_path": str(tmp_path / "tokenizer"),
    }
    config = PromptTuningConfig(num_virtual_tokens=n_tokens, task_type="CAUSAL_LM", **given)
    peft: Any = get_peft_model(load_model(tmp_path / "base"), config)
    module: Any = load_model(tmp_path / "base")
    options = {"n_tokens": n_tokens, "text": text}
    # PEFT takes what the tokenizer puts around a text for a part of it.
    transform(module, AdapterConfig("prompt", options), "none", 0, small_tokenizer.encode)
    assert torch.equal(module.virtual_tokens.embedding.weight, peft.prompt_encoder["default"].embedding.weight)
    assert module.virtual_tokens.embedding.weight.requires_grad
    begun: Any = load_model(tmp_path / "base")
    transform(begun, AdapterConfig("prompt", {"n_tokens": n_tokens}), "none", 0)
    known = begun.get_input_embeddings()(torch.arange(len(small_tokenizer)))
    assert all(bool((known == each).all(dim=1).any()) for each in begun.virtual_tokens.embedding.weight)
    with pytest.raises(ConfigError, match=r"adapter\.options\.text: has no token"):
        transform(load_model(tmp_path / "base"), AdapterConfig("prompt", options), "none", 0, lambda text: [])
