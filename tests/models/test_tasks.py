"""Heads for each task: built by the dial, saved, loaded by plain Transformers; forward passes against one sequence at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.training.conftest import make_examples, make_pairs_of_text, random_sequences

from kajiya.config.schema import ModelConfig
from kajiya.data.batch import Batch
from kajiya.errors import ConfigError
from kajiya.models.build import Vocabulary, build_model
from kajiya.models.load import load_model
from kajiya.models.outputs import masked_logits, padded_sequences, seq2seq_logits, sequence_logits
from kajiya.models.tasks import Task

VOCABULARY = Vocabulary(97, 0, 1, 2)
CLASSES = Task("classes", ("red", "green", "blue"))
CASES = [
    ("bert", Task("masked"), "AutoModelForMaskedLM"),
    ("roberta", Task("masked"), "AutoModelForMaskedLM"),
    ("distilbert", Task("masked"), "AutoModelForMaskedLM"),
    ("modernbert", Task("masked"), "AutoModelForMaskedLM"),
    ("t5", Task("seq2seq"), "AutoModelForSeq2SeqLM"),
    ("bart", Task("seq2seq"), "AutoModelForSeq2SeqLM"),
    ("llama", CLASSES, "AutoModelForSequenceClassification"),
    ("bert", CLASSES, "AutoModelForSequenceClassification"),
    ("qwen3", Task("score"), "AutoModelForSequenceClassification"),
]


def _build(name: str, task: Task, n_params: str = "60k") -> Any:
    return build_model(ModelConfig(name=name, n_params=n_params, max_positions=64), VOCABULARY, 0, task).module.eval()


@pytest.mark.parametrize(("name", "task", "auto"), CASES, ids=lambda case: getattr(case, "name", None) or case)
def test_a_head_is_built_saved_and_loaded_by_transformers(name: str, task: Task, auto: str, tmp_path: Path) -> None:
    model = _build(name, task, "200k")
    assert 100_000 < sum(each.numel() for each in model.parameters()) < 300_000
    model.save_pretrained(tmp_path)
    theirs = getattr(transformers, auto).from_pretrained(tmp_path)
    assert type(theirs) is type(model)
    ours = load_model(tmp_path, task=task)
    for (key, tensor), again, other in zip(
        model.state_dict().items(), theirs.state_dict().values(), ours.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, again), key
        assert torch.equal(tensor, other), key
    if task.name == "classes":
        assert theirs.config.id2label == {0: "red", 1: "green", 2: "blue"}


def test_weights_of_a_text_model_get_a_new_head_and_keep_the_rest(tmp_path: Path) -> None:
    base = _build("llama", Task())
    base.save_pretrained(tmp_path)
    config = ModelConfig(name="llama", path=str(tmp_path))
    model, again = (build_model(config, VOCABULARY, 3, CLASSES).module for _ in range(2))
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
    assert model.score.weight.shape[0] == 3
    assert torch.equal(model.score.weight, again.score.weight)
    assert model.config.pad_token_id == VOCABULARY.pad_id


def test_an_architecture_without_the_head_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"(?s)model\.name.*llama has no MaskedLM head.*bert"):
        _build("llama", Task("masked"))
    with pytest.raises(ConfigError, match=r"(?s)bert has no Seq2SeqLM head.*t5"):
        _build("bert", Task("seq2seq"))


@pytest.mark.parametrize(
    ("name", "task", "why"),
    [
        ("bert", Task("masked"), "would untie cls.predictions.decoder.bias"),
        ("bart", Task("seq2seq"), "would untie decoder.embed_tokens.weight"),
        ("t5", Task("seq2seq"), "shares embedding and output head whatever it is told"),
    ],
)
def test_an_architecture_whose_head_alone_cannot_be_untied_is_refused(name: str, task: Task, why: str) -> None:
    config = ModelConfig(name=name, n_params="40k", max_positions=64, tied=False)
    with pytest.raises(ConfigError, match=f"(?s)model.tied: is false, and {name} {why}.*model.tied=true"):
        build_model(config, VOCABULARY, 0, task)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma3_text", "qwen3", "mistral"])
def test_a_head_is_untied(name: str) -> None:
    module: Any = build_model(
        ModelConfig(name=name, n_params="40k", max_positions=64, tied=False), VOCABULARY, 0
    ).module
    assert module.get_output_embeddings().weight is not module.get_input_embeddings().weight


def test_packed_sequences_are_scored_as_each_alone() -> None:
    batch = make_examples(random_sequences(6), k=2)
    for name in ("llama", "bert"):
        model = _build(name, CLASSES)
        with torch.no_grad():
            got = sequence_logits(model, batch)
            for sequence, (ids, _) in enumerate(random_sequences(6)):
                alone = model(input_ids=torch.tensor([ids[:-1]])).logits[0]
                torch.testing.assert_close(got[sequence], alone, rtol=1e-4, atol=1e-5)


def test_padded_sequences_hold_every_token_once() -> None:
    sequences = random_sequences(7)
    tokens, mask = padded_sequences(make_examples(sequences, k=1, per_row=3), 2)
    assert [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)] == [ids[:-1] for ids, _ in sequences]


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_masked_rows_see_their_whole_segment_and_no_other(name: str) -> None:
    model = _build(name, Task("masked"))
    rows = make_examples(random_sequences(4, seed=2), k=2).rows
    with torch.no_grad():
        packed = masked_logits(model, rows)
        for row in range(rows.tokens.shape[0]):
            for segment in range(int(rows.segments[row].max())):
                mine = rows.segments[row] == segment
                tokens = rows.tokens[row][mine][None]
                zeros = torch.zeros_like(tokens)
                alone = Batch(tokens, zeros, torch.arange(tokens.shape[1])[None], zeros, 0, is_causal=False)
                torch.testing.assert_close(packed[row][mine], masked_logits(model, alone)[0], rtol=1e-4, atol=1e-5)
                changed = tokens.clone()
                changed[0, -1] = 5 if tokens[0, -1] != 5 else 6
                other = masked_logits(model, Batch(changed, zeros, alone.positions, zeros, 0, is_causal=False))
                assert not torch.allclose(other[0, 0], packed[row][mine][0])


def test_an_encoder_decoder_reads_no_padding() -> None:
    model = _build("t5", Task("seq2seq"))
    batch = make_pairs_of_text(3)
    with torch.no_grad():
        logits = seq2seq_logits(model, batch)
        for row in range(3):
            inputs = batch.inputs[row][batch.inputs_mask[row]][None]
            alone = model(input_ids=inputs, decoder_input_ids=batch.tokens[row : row + 1]).logits[0]
            torch.testing.assert_close(logits[row], alone, rtol=1e-4, atol=1e-5)
