"""`kajiya prove`: no false alarm, nothing left changed, and every seeded bug caught by the check that is for it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.conftest import VOCABULARY, make_batch, make_examples, random_sequences
from tests.training.test_fit import make_setup

from kajiya.config.schema import (
    AdapterConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    PreflightConfig,
    TrainConfig,
)
from kajiya.data.batch import NO_TARGET, Batch
from kajiya.errors import ProofError
from kajiya.models.adapt import transform
from kajiya.models.build import build_model
from kajiya.models.save import save_model
from kajiya.models.trained import save_trained
from kajiya.preflight.joining import joined, with_fewer
from kajiya.preflight.prove import Verdict, prove, require_proven
from kajiya.preflight.subject import Subject
from kajiya.run.store import Artifact
from kajiya.training.fit import Setup
from kajiya.training.losses import load_loss, load_measure
from kajiya.training.losses.sequences import sequence_log_probs


class _Tokenizer:
    """As much of a tokenizer as the checks ask for."""

    eos_token_id = VOCABULARY.eos_id
    eos_token = "<eos>"
    chat_template = None

    def __len__(self) -> int:
        return VOCABULARY.size

    def save_pretrained(self, folder: Path) -> None:
        """Nothing to save."""


def _rows(seed: int) -> Batch:
    """Two rows of two documents each, every token a target, each document ended by end of text."""
    batch = make_batch(2, tokens=32, seed=seed, keep=1.1)
    tokens, segments = batch.tokens.clone(), batch.segments
    last = torch.ones_like(segments, dtype=torch.bool)
    last[:, :-1] = segments[:, 1:] != segments[:, :-1]
    tokens[last] = VOCABULARY.eos_id
    targets = torch.full_like(tokens, NO_TARGET)
    targets[:, :-1] = torch.where(last[:, :-1], NO_TARGET, tokens[:, 1:])
    return replace(batch, tokens=tokens, targets=targets, n_targets=int((targets != NO_TARGET).sum()))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Artifact]:
    """A corpus of a few documents; with `True`, one of them is in both splits."""
    from kajiya.data.documents import DocumentWriter

    def make(is_shared: bool) -> Artifact:
        folder = tmp_path_factory.mktemp("corpus")
        for split, texts in {
            "train": ["one", "two", "three"],
            "heldout": ["four", "two" if is_shared else "five!"],
        }.items():
            with DocumentWriter(folder, split) as writer:
                for number, text in enumerate(texts):
                    writer.add(f"{split}{number}", text.encode())
                writer.finish()
        return Artifact(folder, "corpus", "key", "digest", {"format": "text"})

    return make


@dataclass
class Parts:
    """What a bug can change before the run is proven."""

    model: Any
    batches: list[Batch]
    config: Config
    setup_changes: dict[str, Any]
    is_shared: bool = False
    save: Callable[[Any, Path], object] | None = None
    peak_bytes: int = 2**28


def _parts(adapter: str = "none") -> Parts:
    sizes: Any = {"n_params": None, "hidden_size": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "ffn_size": 48}
    model = ModelConfig(**sizes, max_positions=64)
    config = Config(
        model=model,
        adapter=AdapterConfig(adapter),
        data=DataConfig(row_tokens=32),
        train=TrainConfig(minutes=None, steps=100),
    )
    module = build_model(model, VOCABULARY, 0).module
    module.generation_config.eos_token_id = VOCABULARY.eos_id
    transform(module, config.adapter, "none", 0)
    return Parts(module.train(), [_rows(seed) for seed in range(3)], config, {})


def _verdict(parts: Parts, corpus: Callable[[bool], Artifact]) -> tuple[Verdict, Setup]:
    import math

    def lr(step: int) -> float:
        return parts.config.optim.lr * min(step / 10, 0.5 * (1 + math.cos(math.pi * max(0, step - 10) / 90)))

    config = replace(parts.config, schedule=replace(parts.config.schedule, warmup_fraction=0.1))
    setup = make_setup(parts.model, parts.batches, **{"steps": 100, "lr": lr} | parts.setup_changes)
    rebuild = lambda: build_model(config.model, VOCABULARY, 0).module  # noqa: E731
    tokenizer = _Tokenizer()

    def save(folder: Path) -> object:
        if parts.save is not None:
            return parts.save(setup.model, folder)
        return save_trained(config.model, setup.model, tokenizer, folder, rebuild)

    def reopen(folder: Path) -> Any:
        from kajiya.models.open import open_model

        return open_model(folder, torch.float32)

    subject = Subject(config, setup, tokenizer, corpus(parts.is_shared), parts.peak_bytes, save, reopen)
    return prove(subject), setup


# ---------------------------------------------------------------- no false alarm


@pytest.mark.parametrize("adapter", ["none", "lora", "dora", "ia3", "prefix", "prompt"])
def test_a_sound_run_passes_and_is_left_as_it_was(adapter: str, corpus: Callable[[bool], Artifact]) -> None:
    parts = _parts(adapter)

    def state() -> str:
        hasher = hashlib.sha256()
        for name, tensor in parts.model.state_dict().items():
            hasher.update(name.encode() + tensor.numpy().tobytes())
        return hasher.hexdigest()

    torch.manual_seed(3)
    before, generator = state(), torch.get_rng_state()
    verdict, setup = _verdict(parts, corpus)
    assert [finding.text for finding in verdict.failures()] == []
    assert {finding.state for finding in verdict.findings} == {"passed"}
    assert state() == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert setup.loader.state() == {"index": 0}
    assert setup.model.training
    assert not any(key.startswith("exp_avg") for key in setup.optimizer.state_tensors())


def test_a_check_is_skipped_by_name_and_said(corpus: Callable[[bool], Artifact]) -> None:
    parts = _parts()
    parts.is_shared = True
    parts.config = replace(parts.config, preflight=PreflightConfig(skip=("disjoint",)))
    verdict, _ = _verdict(parts, corpus)
    assert verdict.failures() == []
    assert [f.text for f in verdict.findings if f.name == "disjoint"] == ["by preflight.skip"]


def test_a_failure_names_the_check_the_figure_and_the_remedy(corpus: Callable[[bool], Artifact]) -> None:
    parts = _parts()
    parts.is_shared = True
    verdict, _ = _verdict(parts, corpus)
    with pytest.raises(ProofError, match=r"disjoint: 1 of 2 held-out(.|\n)*near_duplicate(.|\n)*skip=\[disjoint\]"):
        require_proven(verdict.failures())


@pytest.mark.parametrize(("form", "state"), [("chat", "passed"), ("text", "failed")])
def test_an_answer_may_end_within_its_conversation(form: str, state: str, corpus: Callable[[bool], Artifact]) -> None:
    """Where an answer's end is the end of text, as in ChatML; a text that goes on behind it is the loader's fault."""
    parts = _parts()
    skip = ("accumulation", "trainable", "reload", "learning")
    parts.config = replace(parts.config, preflight=PreflightConfig(skip=skip))
    for index, batch in enumerate(parts.batches):
        tokens, targets = batch.tokens.clone(), batch.targets.clone()
        inside = (batch.segments[:, :-2] == batch.segments[:, 2:]) & (batch.targets[:, :-2] != NO_TARGET)
        row, place = inside.nonzero()[0].tolist()
        tokens[row, place + 1] = targets[row, place] = VOCABULARY.eos_id
        parts.batches[index] = replace(batch, tokens=tokens, targets=targets)
    verdict, _ = _verdict(parts, lambda is_shared: replace(corpus(is_shared), facts={"format": form}))
    assert {each.state for each in verdict.findings if each.name == "isolation"} == {state}


# ---------------------------------------------------------------- seeded bugs

BUGS: dict[str, tuple[str, Callable[[Parts], None]]] = {}


def bug(caught_by: str) -> Callable[[Callable[[Parts], None]], Callable[[Parts], None]]:
    """Register a bug, with the check that is to catch it."""

    def register(inject: Callable[[Parts], None]) -> Callable[[Parts], None]:
        BUGS[inject.__name__] = (caught_by, inject)
        return inject

    return register


def _each(parts: Parts, change: Callable[[Batch], Batch]) -> None:
    parts.batches = [change(batch) for batch in parts.batches]


def _with_targets(batch: Batch, targets: torch.Tensor) -> Batch:
    return replace(batch, targets=targets, n_targets=int((targets != NO_TARGET).sum()))


@bug("targets")
def mask_all_zero(parts: Parts) -> None:
    _each(parts, lambda batch: _with_targets(batch, torch.full_like(batch.targets, NO_TARGET)))


@bug("targets")
def targets_not_shifted(parts: Parts) -> None:
    _each(parts, lambda batch: _with_targets(batch, batch.tokens.clone()))


@bug("targets")
def targets_shifted_twice(parts: Parts) -> None:
    _each(parts, lambda batch: _with_targets(batch, batch.targets.roll(-1, 1)))


@bug("targets")
def end_of_text_masked(parts: Parts) -> None:
    _each(parts, lambda batch: _with_targets(batch, torch.where(batch.targets == 1, NO_TARGET, batch.targets)))


@bug("targets")
def generation_config_without_the_end(parts: Parts) -> None:
    parts.model.generation_config.eos_token_id = 77


@bug("isolation")
def documents_in_one_segment(parts: Parts) -> None:
    _each(parts, lambda batch: replace(batch, segments=torch.zeros_like(batch.segments)))


@bug("isolation")
def attention_sees_the_whole_row(parts: Parts) -> None:
    parts.model.config._attn_implementation = "sdpa"
    forward = parts.model.model.forward

    def leaking(**inputs: Any) -> Any:
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
        return forward(**inputs | {"attention_mask": None})

    parts.model.model.forward = leaking


@bug("isolation")
def a_running_mean_over_the_row(parts: Parts) -> None:
    inner = parts.model.model.layers[0].mlp
    inner.register_forward_hook(lambda module, args, output: output + output.mean(1, keepdim=True))


def _loss(function: Callable[[Any, Any, Any], Any]) -> Callable[[Parts], None]:
    def inject(parts: Parts) -> None:
        honest = load_loss(LossConfig(options={"chunk_tokens": 7}))
        parts.setup_changes["loss"] = lambda model, batch: function(honest, model, batch)

    return inject


@bug("accumulation")
def a_mean_of_means(parts: Parts) -> None:
    def loss(honest: Any, model: Any, batch: Batch) -> Any:
        terms, metrics = honest(model, batch)
        value, count = terms["loss"]
        # What a loss does that divides by itself: each micro-batch weighs the same.
        return {"loss": (value / batch.n_targets * 10, count)}, metrics

    _loss(loss)(parts)


@bug("accumulation")
def a_loss_of_the_rows_means(parts: Parts) -> None:
    def loss(honest: Any, model: Any, batch: Batch) -> Any:
        terms, metrics = honest(model, batch)
        value, count = terms["loss"]
        return {"loss": (value * len(batch.tokens), count)}, metrics

    _loss(loss)(parts)


@bug("trainable")
def a_head_cut_off_from_the_loss(parts: Parts) -> None:
    layer = parts.model.model.layers[1].mlp.down_proj
    layer.register_forward_hook(lambda module, args, output: output.detach())


@bug("trainable")
def a_norm_that_is_never_used(parts: Parts) -> None:
    parts.model.model.layers[0].spare = torch.nn.LayerNorm(32)


@bug("trainable")
def an_optimizer_that_forgets_a_matrix(parts: Parts) -> None:
    parameter = parts.model.model.layers[0].self_attn.q_proj.weight
    parameter.register_hook(lambda grad: torch.zeros_like(grad))


@bug("trainable")
def a_frozen_weight_that_moves(parts: Parts) -> None:
    layer = parts.model.model.layers[0].self_attn.k_proj
    layer.weight.requires_grad_(False)

    def drift(_: torch.Tensor) -> None:
        with torch.no_grad():
            layer.weight.mul_(1.0001)

    parts.model.model.embed_tokens.weight.register_post_accumulate_grad_hook(drift)


@bug("reload")
def a_head_saved_untied(parts: Parts) -> None:
    def save(model: Any, folder: Path) -> None:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
        save_model(model, _Tokenizer(), folder)
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight

    parts.save = save


@bug("reload")
def weights_saved_before_training(parts: Parts) -> None:
    parts.save = lambda model, folder: save_model(
        build_model(parts.config.model, VOCABULARY, 0).module, _Tokenizer(), folder
    )


@bug("reload")
def one_layer_saved_wrong(parts: Parts) -> None:
    def save(model: Any, folder: Path) -> None:
        weight = model.model.layers[1].mlp.up_proj.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
        save_model(model, _Tokenizer(), folder)
        with torch.no_grad():
            weight.copy_(kept)

    parts.save = save


@bug("start")
def weights_of_a_huge_spread(parts: Parts) -> None:
    with torch.no_grad():
        for parameter in parts.model.parameters():
            parameter.mul_(20 if parameter.ndim == 2 else 1)


@bug("start")
def weights_of_another_tokenizer(parts: Parts) -> None:
    parts.config = replace(parts.config, model=replace(parts.config.model, path="somewhere"))


@bug("start")
def weights_that_are_no_numbers(parts: Parts) -> None:
    with torch.no_grad():
        parts.model.model.norm.weight.fill_(float("nan"))


@bug("start")
def logits_scaled_behind_the_head(parts: Parts) -> None:
    parts.model.lm_head.register_forward_hook(lambda module, args, output: 0.5 * output)


@bug("learning")
def a_loss_that_teaches_nothing(parts: Parts) -> None:
    def loss(honest: Any, model: Any, batch: Batch) -> Any:
        terms, metrics = honest(model, batch)
        value, count = terms["loss"]
        return {"loss": (value.detach() + 0 * value, count)}, metrics

    _loss(loss)(parts)


@bug("learning")
def a_loss_of_the_wrong_sign(parts: Parts) -> None:
    def loss(honest: Any, model: Any, batch: Batch) -> Any:
        terms, metrics = honest(model, batch)
        value, count = terms["loss"]
        return {"loss": (value + 2 * (value.detach() - value), count)}, metrics

    _loss(loss)(parts)


@bug("schedule")
def a_warm_up_that_does_nothing(parts: Parts) -> None:
    parts.setup_changes["lr"] = lambda step: 3e-3


@bug("schedule")
def a_clock_of_micro_batches(parts: Parts) -> None:
    parts.setup_changes["lr"] = lambda step: 3e-3 * (1 - 4 * step / 100)


@bug("schedule")
def a_rate_that_never_reaches_its_peak(parts: Parts) -> None:
    parts.setup_changes["lr"] = lambda step: 3e-3 * step / 1000


@bug("memory")
def a_batch_that_fills_the_machine(parts: Parts) -> None:
    parts.peak_bytes = 2**60


@bug("disjoint")
def a_held_out_document_in_training(parts: Parts) -> None:
    parts.is_shared = True


@pytest.mark.parametrize("name", BUGS)
def test_each_seeded_bug_is_caught_by_its_check(name: str, corpus: Callable[[bool], Artifact]) -> None:
    caught_by, inject = BUGS[name]
    parts = _parts()
    inject(parts)
    verdict, _ = _verdict(parts, corpus)
    assert caught_by in [finding.name for finding in verdict.failures()]
    remedy = next(finding.remedy for finding in verdict.failures() if finding.name == caught_by)
    assert remedy


# ---------------------------------------------------------------- losses that look at the whole group


def _feedback_parts() -> Parts:
    """KTO on labelled examples, with their reference and their mismatched answers."""
    parts = _parts()
    batches: list[Any] = []
    for seed in range(3):
        batch, other = (make_examples(random_sequences(6, each), k=1) for each in (seed, seed + 20))
        own, mismatched = (replace(each, reference=_log_probs(parts.model, each)) for each in (batch, other))
        # As after some steps of training: at the very first the point is zero, however it is measured.
        own = replace(own, reference=own.reference - torch.linspace(-2, 2, 6))
        mismatched = replace(mismatched, reference=mismatched.reference - torch.linspace(0, 3 + seed, 6))
        own = replace(own, labels=torch.tensor([1.0, 0, 1, 1, 0, 0]), mismatched=mismatched)
        batches.append(own)
    parts.batches = batches
    loss = LossConfig("kto", {"chunk_tokens": 7})
    parts.config = replace(parts.config, train=replace(parts.config.train, loss=loss))
    parts.setup_changes |= {"loss": load_loss(loss), "measure": load_measure(loss)}
    return parts


def _log_probs(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return sequence_log_probs(model, batch, 64)[0]


def _mean_of_each_micro_batch(honest: Any, measure: Any, model: Any, batch: Any) -> Any:
    terms, metrics = honest(model, batch)
    value, count = terms["loss"]
    return {"loss": (value / len(batch.examples), count)}, metrics


def _point_of_each_micro_batch(honest: Any, measure: Any, model: Any, batch: Any) -> Any:
    point = float(measure(model, batch)["kl"][0]) / len(batch.examples)
    return honest(model, replace(batch, measured={"kl": point}))


@pytest.mark.parametrize("wrong", [None, _mean_of_each_micro_batch, _point_of_each_micro_batch])
def test_accumulation_is_proven_for_a_loss_that_measures_its_group(
    wrong: Callable[..., Any] | None, corpus: Callable[[bool], Artifact]
) -> None:
    parts = _feedback_parts()
    if wrong is not None:
        honest, measure = parts.setup_changes["loss"], parts.setup_changes["measure"]
        parts.setup_changes["loss"] = lambda model, batch: wrong(honest, measure, model, batch)
    verdict, _ = _verdict(parts, corpus)
    (found,) = (finding for finding in verdict.findings if finding.name == "accumulation")
    assert found.state == ("passed" if wrong is None else "failed"), found.text
    assert (found.figures["difference"] > 1e-3) == (wrong is not None)


def test_joined_micro_batches_are_what_a_larger_one_would_be() -> None:
    """Of unlike widths, with examples numbered on and the last tokens found again."""
    sequences = random_sequences(10, 4)
    first, second = make_examples(sequences[:4], k=2), make_examples(sequences[4:], k=2)
    both = joined(first, second)
    model = _parts().model.eval()
    expected = torch.cat([_log_probs(model, each) for each in (first, second)])
    torch.testing.assert_close(_log_probs(model, both), expected)
    assert both.counts == {"targets": first.n_targets + second.n_targets, "examples": 5}
    ids = both.rows.tokens.flatten()[both.last]
    assert ids.tolist() == [sequence[0][-2] for sequence in sequences]
    fewer = with_fewer(second)
    assert len(fewer.examples) == 2
    torch.testing.assert_close(_log_probs(model, fewer), _log_probs(model, second)[:4])


def test_there_are_bugs_enough() -> None:
    assert len(BUGS) >= 20
    assert {caught_by for caught_by, _ in BUGS.values()} == {
        "targets", "isolation", "accumulation", "trainable", "reload", "start", "learning", "schedule", "memory", "disjoint",
    }  # fmt: skip
