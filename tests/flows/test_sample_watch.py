"""Looks at a model in training: what it writes and how its tensors are distributed are events, and change nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.conftest import Finished
from tests.training.conftest import make_batch, make_examples, random_sequences

from kajiya.config.schema import Config
from kajiya.data.batch import NO_TARGET
from kajiya.errors import ConfigError
from kajiya.flows.sample_watch import heldout_prompts, open_samples
from kajiya.flows.train import Scope, train
from kajiya.run.events import read_events
from kajiya.run.hashing import hash_file
from kajiya.run.store import Store


def test_samples_and_histograms_are_events_and_change_no_weight(
    small_config: Callable[..., Config], finished: Finished, tmp_path: Path
) -> None:
    """Beside the same run without a look, whose last step is the same to the bit."""
    config = small_config("train.samples_every=6", "train.histograms_every=5", "eval.samples=2")
    looked = train(config, Store(tmp_path), scope=Scope(is_evaluated=False, is_reported=False))
    assert looked.model is not None
    plain = finished.trained.model.path / "model.safetensors"
    assert hash_file(looked.model.path / "model.safetensors") == hash_file(plain)
    events = list(read_events(looked.run.folder))
    samples = [event for event in events if event["kind"] == "sample"]
    assert [event["step"] for event in samples] == [6, 6, 12, 12]
    assert all(event["prompt"] for event in samples)
    assert samples[0]["prompt"] == samples[2]["prompt"]
    assert samples[0]["prompt"] != samples[1]["prompt"]
    assert [event["step"] for event in events if event["kind"] == "histograms"] == [5, 10]
    assert not list(looked.run.folder.glob(".samples-*"))
    assert "sampling" in looked.run.manifest()["time"]["spent_s"]


def test_prompts_are_what_stands_before_the_first_target() -> None:
    sequences = random_sequences(6, seed=2)
    packed = make_examples(sequences, k=1, per_row=2)
    assert heldout_prompts([packed]) == [ids[:n] for ids, n in sequences[::2]]
    text = make_batch(2)
    text.targets[:, 0] = text.tokens[:, 1]
    for tokens, segments, prompt in zip(text.tokens, text.segments, heldout_prompts([text]), strict=True):
        n = int((segments == 0).sum())
        assert prompt == tokens[: max(1, n // 2)].tolist()
    text.targets[:] = NO_TARGET
    assert [len(prompt) for prompt in heldout_prompts([text])] == [int((s == 0).sum()) for s in text.segments]


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("model.name=pkg.mod:fn", "module of one's own"),
        ("adapter.name=prompt", "virtual tokens"),
        ("train.loss.name=masked_lm", "masked_lm"),
        ("eval.samples=0", r"eval\.samples"),
    ],
)
def test_a_model_that_cannot_be_asked_is_refused(setting: str, why: str, small_config: Callable[..., Config]) -> None:
    config = small_config("train.samples_every=6")
    section, _, name = setting.partition("=")[0].rpartition(".")
    config = _with(config, section, name, setting.partition("=")[2])
    with pytest.raises(ConfigError, match=rf"train\.samples_every.*{why}"):
        open_samples(config, None, lambda _: None, Path())  # type: ignore[arg-type]


def _with(config: Config, section: str, name: str, text: str) -> Config:
    """The config with one field set, past the checks of composing."""
    value = int(text) if text.isdigit() else text
    if section == "train.loss":
        return replace(config, train=replace(config.train, loss=replace(config.train.loss, name=value)))
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})
