"""`kajiya prove`: no false alarm, nothing left changed, and every seeded bug caught by the check that is for it."""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.preflight.conftest import (
    Corpus,
    Parts,
    Tokenizer,
    as_policy,
    finding,
    log_probs_of,
    make_parts,
    only,
    verdict_of,
)
from tests.training.conftest import VOCABULARY, ListLoader, make_examples, random_sequences

from kajiya.config.schema import LossConfig, PreflightConfig
from kajiya.data.batch import NO_TARGET, Batch
from kajiya.data.documents import DocumentWriter
from kajiya.errors import ProofError
from kajiya.models.build import build_model
from kajiya.models.save import save_model
from kajiya.preflight.joining import joined, with_fewer
from kajiya.preflight.prove import require_proven
from kajiya.preflight.prove_run import available_bytes
from kajiya.run.provenance import machine_facts
from kajiya.run.usage import resident_memory
from kajiya.training.losses import load_loss, load_measure

# ---------------------------------------------------------------- no false alarm


@pytest.mark.parametrize("adapter", ["none", "lora", "dora", "ia3", "prefix", "prompt"])
def test_a_sound_run_passes_and_is_left_as_it_was(adapter: str, corpus: Corpus) -> None:
    parts = make_parts(adapter)

    def state() -> str:
        hasher = hashlib.sha256()
        for name, tensor in parts.model.state_dict().items():
            hasher.update(name.encode() + tensor.numpy().tobytes())
        return hasher.hexdigest()

    def generators() -> tuple[object, ...]:
        _, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), random.getstate(), keys.tolist(), rest

    loader = ListLoader(parts.batches)
    loader.next()
    parts.setup_changes["loader"] = loader
    torch.manual_seed(3)
    before, drawn = state(), generators()
    verdict, setup = verdict_of(parts, corpus)
    assert [each.text for each in verdict.failures()] == []
    assert {each.state for each in verdict.findings} == {"passed"}
    assert state() == before
    assert generators() == drawn
    assert setup.loader.state() == {"index": 1}
    assert setup.model.training
    assert not any(key.startswith("exp_avg") for key in setup.optimizer.state_tensors())


def test_a_check_is_skipped_by_name_and_said(corpus: Corpus) -> None:
    parts = make_parts()
    parts.is_shared = True
    parts.config = replace(parts.config, preflight=PreflightConfig(skip=("disjoint",)))
    verdict, _ = verdict_of(parts, corpus)
    assert verdict.failures() == []
    assert finding(verdict, "disjoint").text == "by preflight.skip"


def test_a_failure_names_the_check_the_figure_and_the_remedy(corpus: Corpus) -> None:
    parts = make_parts()
    parts.is_shared = True
    verdict, _ = verdict_of(parts, corpus)
    with pytest.raises(ProofError, match=r"disjoint: 1 of 2 held-out(.|\n)*near_duplicate(.|\n)*skip=\[disjoint\]"):
        require_proven(verdict.failures())


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
def texts_without_an_end(parts: Parts) -> None:
    def ended(batch: Batch) -> Batch:
        tokens, targets = (torch.where(each == 1, 5, each) for each in (batch.tokens, batch.targets))
        return replace(batch, tokens=tokens, targets=targets)

    _each(parts, ended)


@bug("targets")
def one_end_of_text_learnt_in_many(parts: Parts) -> None:
    first = parts.batches[0]
    end_of_text_masked(parts)
    parts.batches[0] = first


@bug("targets")
def a_text_half_masked(parts: Parts) -> None:
    _each(parts, lambda batch: _with_targets(batch, torch.where(batch.positions < 3, NO_TARGET, batch.targets)))


@bug("targets")
def generation_config_without_the_end(parts: Parts) -> None:
    parts.model.generation_config.eos_token_id = 77


@bug("isolation")
def documents_in_one_segment(parts: Parts) -> None:
    _each(parts, lambda batch: replace(batch, segments=torch.zeros_like(batch.segments)))


@bug("isolation")
def two_documents_packed_as_one(parts: Parts) -> None:
    """In one row of six, positions going on as they would."""
    batch = parts.batches[2]
    segments, positions = batch.segments.clone(), batch.positions.clone()
    segments[1], positions[1] = 0, torch.arange(32)
    parts.batches[2] = replace(batch, segments=segments, positions=positions)


@bug("isolation")
def positions_that_go_on_in_the_next_document(parts: Parts) -> None:
    _each(parts, lambda batch: replace(batch, positions=torch.arange(32).expand(2, 32).clone()))


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


@bug("accumulation")
def a_mean_of_means_over_answers(parts: Parts) -> None:
    as_policy(parts)
    honest = parts.setup_changes["loss"]

    def loss(model: Any, batch: Any) -> Any:
        terms, metrics = honest(model, batch)
        value, count = terms["loss"]
        return {"loss": (value / batch.n_targets * 10, count)}, metrics

    parts.setup_changes["loss"] = loss


@bug("accumulation")
def a_mean_over_the_prompts_of_a_micro_batch(parts: Parts) -> None:
    as_policy(parts, normalize="sequence")
    honest = parts.setup_changes["loss"]

    def loss(model: Any, batch: Any) -> Any:
        terms, metrics = honest(model, batch)
        value, count = terms["loss"]
        return {"loss": (value / batch.counts["examples"], count)}, metrics

    parts.setup_changes["loss"] = loss


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


@bug("trainable")
def a_frozen_weight_written_behind_autograd(parts: Parts) -> None:
    layer = parts.model.model.layers[0].self_attn.k_proj
    layer.weight.requires_grad_(False)

    def drift(_: torch.Tensor) -> None:
        layer.weight.data *= 1.0001

    parts.model.model.embed_tokens.weight.register_post_accumulate_grad_hook(drift)


@bug("reload")
def a_head_saved_untied(parts: Parts) -> None:
    def save(model: Any, folder: Path) -> None:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
        save_model(model, Tokenizer(), folder)
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight

    parts.save = save


@bug("reload")
def weights_saved_before_training(parts: Parts) -> None:
    parts.save = lambda model, folder: save_model(
        build_model(parts.config.model, VOCABULARY, 0).module, Tokenizer(), folder
    )


@bug("reload")
def one_layer_saved_wrong(parts: Parts) -> None:
    def save(model: Any, folder: Path) -> None:
        weight = model.model.layers[1].mlp.up_proj.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
        save_model(model, Tokenizer(), folder)
        with torch.no_grad():
            weight.copy_(kept)

    parts.save = save


@bug("reload")
def a_small_tensor_left_out_in_bf16(parts: Parts) -> None:
    """Three steps move a norm by so little that logits in bf16 hardly show it."""
    norm = parts.model.model.layers[0].input_layernorm.weight
    kept = norm.detach().clone()

    def save(model: Any, folder: Path) -> None:
        weight = model.model.layers[0].input_layernorm.weight
        trained = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(kept)
        save_model(model, Tokenizer(), folder)
        with torch.no_grad():
            weight.copy_(trained)

    parts.save = save
    parts.precision = "bf16"
    parts.config = replace(parts.config, optim=replace(parts.config.optim, lr=1e-2))


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


@bug("learning")
def a_loss_that_falls_and_rises_again(parts: Parts) -> None:
    """A sign that turns after eight steps: one look in between would find the loss lower than before."""
    calls = iter(range(10**6))

    def loss(honest: Any, model: Any, batch: Batch) -> Any:
        terms, metrics = honest(model, batch)
        value, count = terms["loss"]
        turned = value + 2 * (value.detach() - value) if torch.is_grad_enabled() and next(calls) >= 8 else value
        return {"loss": (turned, count)}, metrics

    _loss(loss)(parts)
    parts.config = replace(parts.config, preflight=PreflightConfig(skip=("accumulation", "trainable", "reload")))


@bug("learning")
def a_rate_that_teaches_nothing(parts: Parts) -> None:
    parts.config = replace(parts.config, optim=replace(parts.config.optim, lr=1e-8))


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
    parts.plan["peak_bytes"] = 2**60


@bug("disjoint")
def a_held_out_document_in_training(parts: Parts) -> None:
    parts.is_shared = True


@pytest.mark.parametrize(
    ("trained", "heldout", "state"),
    [
        ([("a", 1), ("b", 1), ("a", 2)], [("a", 3)], "failed"),
        ([("a", 1), ("b", 1)], [("c", 3)], "passed"),
        ([("a", 1)], [("a", 2), *((str(n), n) for n in range(19))], "passed"),
        ([("frame", n) for n in range(65)], [("frame", 99)], "passed"),
    ],
)
def test_a_prompt_on_both_sides_is_found(
    trained: list[tuple[str, int]], heldout: list[tuple[str, int]], state: str, tmp_path: Path, corpus: Corpus
) -> None:
    for split, rows in (("train", trained), ("heldout", heldout)):
        with DocumentWriter(tmp_path, split) as writer:
            for prompt, number in rows:
                row = {"prompt": prompt, "chosen": f"yes {number}", "rejected": "no"}
                writer.add(f"{split}/{prompt}/{number}", json.dumps(row).encode())
            writer.finish()
    parts = make_parts()
    parts.form = "preference"
    made = replace(corpus(False), path=tmp_path)
    verdict, _ = verdict_of(only(parts, "disjoint"), lambda _: made)
    found = finding(verdict, "disjoint")
    assert found.state == state, found.text
    n_shared = sum(prompt in dict(trained) for prompt, _ in heldout if prompt != "frame")
    assert f"{n_shared} of {len(heldout)} held-out rows share their prompt" in found.text
    assert (found.remedy == "Set data.heldout_by=prompt.") == (state == "failed")


@pytest.mark.parametrize("name", BUGS)
def test_each_seeded_bug_is_caught_by_its_check(name: str, corpus: Corpus) -> None:
    caught_by, inject = BUGS[name]
    parts = make_parts()
    inject(parts)
    verdict, _ = verdict_of(parts, corpus)
    assert caught_by in [each.name for each in verdict.failures()]
    assert finding(verdict, caught_by).remedy


# ---------------------------------------------------------------- losses that look at the whole group


def _feedback_parts() -> Parts:
    """KTO on labelled examples, with their reference and their mismatched answers."""
    parts = make_parts()
    batches: list[Any] = []
    for seed in range(3):
        batch, other = (make_examples(random_sequences(6, each), k=1) for each in (seed, seed + 20))
        own, mismatched = (replace(each, reference=log_probs_of(parts.model, each)) for each in (batch, other))
        # As after some steps of training: at the very first the point is zero, however it is measured.
        own = replace(own, reference=own.reference - torch.linspace(-2, 2, 6))
        mismatched = replace(mismatched, reference=mismatched.reference - torch.linspace(0, 3 + seed, 6))
        own = replace(own, labels=torch.tensor([1.0, 0, 1, 1, 0, 0]), mismatched=mismatched)
        batches.append(own)
    parts.batches = batches
    loss = LossConfig("kto", {"chunk_tokens": 7})
    parts.form = "feedback"
    parts.config = replace(parts.config, train=replace(parts.config.train, loss=loss))
    parts.setup_changes |= {"loss": load_loss(loss), "measure": load_measure(loss)}
    return parts


def _mean_of_each_micro_batch(honest: Any, measure: Any, model: Any, batch: Any) -> Any:
    terms, metrics = honest(model, batch)
    value, count = terms["loss"]
    return {"loss": (value / len(batch.examples), count)}, metrics


def _point_of_each_micro_batch(honest: Any, measure: Any, model: Any, batch: Any) -> Any:
    point = float(measure(model, batch)["kl"][0]) / len(batch.examples)
    return honest(model, replace(batch, measured={"kl": point}))


@pytest.mark.parametrize("wrong", [None, _mean_of_each_micro_batch, _point_of_each_micro_batch])
def test_accumulation_is_proven_for_a_loss_that_measures_its_group(
    wrong: Callable[..., Any] | None, corpus: Corpus
) -> None:
    parts = _feedback_parts()
    if wrong is not None:
        honest, measure = parts.setup_changes["loss"], parts.setup_changes["measure"]
        parts.setup_changes["loss"] = lambda model, batch: wrong(honest, measure, model, batch)
    verdict, _ = verdict_of(parts, corpus)
    found = finding(verdict, "accumulation")
    assert found.state == ("passed" if wrong is None else "failed"), found.text
    assert (found.figures["difference"] > 1e-3) == (wrong is not None)


def test_a_loss_that_is_not_finite_is_called_so(corpus: Corpus) -> None:
    parts = make_parts()
    honest = load_loss(LossConfig("next_token", {"chunk_tokens": 7}))

    def broken(model: Any, batch: Any) -> Any:
        terms, metrics = honest(model, batch)
        return {name: (total * float("nan"), count) for name, (total, count) in terms.items()}, metrics

    parts.setup_changes |= {"loss": broken}
    verdict, _ = verdict_of(parts, corpus)
    assert finding(verdict, "accumulation").text == "the gradient of a micro-batch is not finite"
    assert finding(verdict, "start").text.startswith("the first loss is not finite: {'loss': nan}")


def test_noise_on_the_embeddings_is_no_alarm(corpus: Corpus) -> None:
    """NEFTune draws anew for each micro-batch, as dropout does."""
    parts = make_parts()
    loss = LossConfig("next_token", {"chunk_tokens": 7, "neftune_alpha": 5.0})
    parts.config = replace(parts.config, train=replace(parts.config.train, loss=loss))
    parts.setup_changes |= {"loss": load_loss(loss)}
    verdict, _ = verdict_of(parts, corpus)
    found = finding(verdict, "accumulation")
    assert found.state == "passed", found.text


def test_joined_micro_batches_are_what_a_larger_one_would_be() -> None:
    """Of unlike widths, with examples numbered on and the last tokens found again."""
    sequences = random_sequences(10, 4)
    first, second = make_examples(sequences[:4], k=2), make_examples(sequences[4:], k=2)
    both = joined(first, second)
    model = make_parts().model.eval()
    expected = torch.cat([log_probs_of(model, each) for each in (first, second)])
    torch.testing.assert_close(log_probs_of(model, both), expected)
    assert both.counts == {"targets": first.n_targets + second.n_targets, "examples": 5}
    ids = both.rows.tokens.flatten()[both.last]
    assert ids.tolist() == [sequence[0][-2] for sequence in sequences]
    fewer = with_fewer(second)
    assert len(fewer.examples) == 2
    torch.testing.assert_close(log_probs_of(model, fewer), log_probs_of(model, second)[:4])


def test_the_schedule_says_how_long_the_run_is(corpus: Corpus) -> None:
    verdict, _ = verdict_of(make_parts(), corpus)
    found = finding(verdict, "schedule")
    assert "64.0k tokens, 1.50 epochs" in found.text
    assert (found.figures["tokens"], found.figures["epochs"]) == (64_000, 1.5)


def test_memory_that_others_hold_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    own = resident_memory()
    monkeypatch.setattr("kajiya.preflight.prove_run.free_bytes", lambda: 2**20)
    assert 2**20 + own / 2 < available_bytes(torch.device("cpu")) < 2**20 + 2 * own
    monkeypatch.setattr("kajiya.preflight.prove_run.free_bytes", lambda: None)
    assert available_bytes(torch.device("cpu")) == machine_facts()["memory_bytes"]


def test_there_are_bugs_enough() -> None:
    assert len(BUGS) >= 20
    assert {caught_by for caught_by, _ in BUGS.values()} == {
        "targets", "isolation", "accumulation", "trainable", "reload", "start", "learning", "schedule", "memory", "disjoint",
    }  # fmt: skip
