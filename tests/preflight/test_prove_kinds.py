"""`kajiya prove` beyond plain text and whole weights: losses with a reference, policies, adapters, few bits, own modules."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.preflight.conftest import (
    Corpus,
    Parts,
    as_policy,
    finding,
    log_probs_of,
    make_parts,
    only,
    verdict_of,
    with_loss,
)
from tests.training.conftest import VOCABULARY, ListLoader, make_examples, make_rollouts, random_sequences
from torch import nn

from kajiya.config.schema import LossConfig, ModelConfig
from kajiya.data.batch import NO_TARGET
from kajiya.models.adapt import transform
from kajiya.models.build import build_model
from kajiya.models.tasks import Task
from kajiya.preflight.joining import in_two, joined
from kajiya.preflight.portion import portion
from kajiya.training.rollouts import own_log_probs

CPU = torch.device("cpu")


# ---------------------------------------------------------------- what theory says of the first loss


def pairs(adapter: str = "none", **options: Any) -> Parts:
    """DPO on pairs whose reference is the model itself: computed before, or its base."""
    parts = with_loss(make_parts(adapter), "preference", "dpo", **options)
    parts.batches = [make_examples(random_sequences(8, seed), k=2) for seed in range(3)]
    if adapter == "none":
        parts.batches = [replace(each, reference=log_probs_of(parts.model, each)) for each in parts.batches]
    return parts


KINDS = {"sigmoid": 0.6931, "sigmoid_norm": 0.6931, "robust": 0.6931, "hinge": 1.0, "ipo": 25.0}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_its_own_reference_begins_where_theory_says(kind: str, corpus: Corpus) -> None:
    more = {"label_smoothing": 0.1} if kind == "robust" else {}
    sound, wrong = (only(pairs(kind=kind, **more), "start") for _ in range(2))
    found = finding(verdict_of(sound, corpus)[0], "start")
    assert found.state == "passed", found.text
    assert found.figures["loss"] == pytest.approx(KINDS[kind], rel=1e-3)
    # The reference of another model finds the chosen answer likelier.
    shift = torch.tensor([6.0, -6.0]).repeat(4)
    wrong.batches = [replace(each, reference=each.reference + shift) for each in wrong.batches]
    found = finding(verdict_of(wrong, corpus)[0], "start")
    assert found.state == "failed"
    assert "reference" in found.remedy


@pytest.mark.parametrize("is_wrong", [False, True])
def test_feedback_begins_at_half_its_weights(is_wrong: bool, corpus: Corpus) -> None:
    parts = with_loss(make_parts(), "feedback", "kto", desirable_weight=2.0)
    labels = torch.tensor([1.0, 0, 1, 1])
    for seed in range(3):
        own, other = (make_examples(random_sequences(4, each), k=1) for each in (seed, seed + 20))
        own, other = (replace(each, reference=log_probs_of(parts.model, each)) for each in (own, other))
        if is_wrong:
            own = replace(own, reference=own.reference - 8 * labels)
        parts.batches[seed] = replace(own, labels=labels, mismatched=other)
    found = finding(verdict_of(only(parts, "start"), corpus)[0], "start")
    assert found.state == ("failed" if is_wrong else "passed"), found.text
    assert is_wrong or found.figures["loss"] == pytest.approx(0.5 * (3 * 2 + 1) / 4, rel=1e-3)


@pytest.mark.parametrize(("name", "state"), [("orpo", "passed"), ("simpo", "passed"), ("my_pkg:loss", "skipped")])
def test_a_loss_that_theory_knows_nothing_of_is_no_pass(name: str, state: str, corpus: Corpus) -> None:
    parts = pairs()
    if ":" not in name:
        with_loss(parts, "preference", name)
    else:
        parts.config = replace(parts.config, train=replace(parts.config.train, loss=LossConfig(name)))
    found = finding(verdict_of(only(parts, "start"), corpus)[0], "start")
    assert found.state == state, found.text
    assert "theory says nothing" in found.text or state == "passed"


# ---------------------------------------------------------------- what is no alarm


def rewards(architecture: str) -> Parts:
    """A reward model of that architecture from scratch, and pairs."""
    parts = with_loss(make_parts(), "preference", "reward", chunk_tokens=None)
    model = ModelConfig(name=architecture, n_params="40k", max_positions=64)
    parts.model = build_model(model, VOCABULARY, 0, Task("score")).module.train()
    parts.batches = [make_examples(random_sequences(n, seed), k=2) for seed, n in enumerate((4, 8, 8))]
    return parts


@pytest.mark.parametrize(("architecture", "name"), [("bert", "classifier.bias"), ("gpt2", "transformer.ln_f.bias")])
@pytest.mark.parametrize("is_cut_off", [False, True])
def test_a_bias_that_no_pair_can_see_is_no_alarm(
    architecture: str, name: str, is_cut_off: bool, corpus: Corpus
) -> None:
    """What is added to both rewards of a pair gets no gradient from their difference; a matrix that gets none is found."""
    parts = rewards(architecture)
    if is_cut_off:
        body = parts.model.base_model
        layer = body.encoder.layer[0].output.dense if architecture == "bert" else body.h[0].mlp.c_proj
        layer.register_forward_hook(lambda module, args, output: output.detach())
    else:
        # Rounding may leave a trace of a gradient.
        bias = dict(parts.model.named_parameters())[name]
        bias.register_hook(lambda grad: torch.where(grad.abs() < 1e-7, 0.0, grad))
    found = finding(verdict_of(only(parts, "trainable"), corpus)[0], "trainable")
    assert found.state == ("failed" if is_cut_off else "passed"), found.text
    assert is_cut_off or f"{name} is the same in both rewards" in found.text


def test_a_loss_that_falls_by_less_than_can_be_told_is_no_alarm_and_no_pass(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kajiya.preflight.prove_steps._ROUNDING", {"fp32": 2.0})
    found = finding(verdict_of(only(make_parts("prompt"), "learning"), corpus)[0], "learning")
    assert found.state == "skipped", found.text
    assert found.text.startswith("80 steps on one batch change its loss")


@pytest.mark.parametrize(
    "make",
    [make_parts, lambda: make_parts("lora"), lambda: as_policy(make_parts())],
    ids=["text", "lora", "policy"],
)
def test_a_rate_that_teaches_nothing_is_found(make: Callable[[], Parts], corpus: Corpus) -> None:
    parts = only(make(), "learning")
    for lr, state in ((1e-8, "failed"), (1e-3, "passed")):
        parts.config = replace(parts.config, optim=replace(parts.config.optim, lr=lr))
        found = finding(verdict_of(parts, corpus)[0], "learning")
        assert found.state == state, found.text
        assert found.remedy.startswith("Raise optim.lr") == (state == "failed")


@pytest.mark.parametrize("is_wrong", [False, True])
def test_the_rounding_of_pairs_whose_sides_cancel_is_no_alarm(is_wrong: bool, corpus: Corpus) -> None:
    """Their gradient in bf16 is rounded by more than a percent; means of means are off by more than that all the same."""
    parts = rewards("bert")
    parts.precision = "bf16"
    if is_wrong:
        honest = parts.setup_changes["loss"]

        def loss(model: Any, batch: Any) -> Any:
            terms, metrics = honest(model, batch)
            value, count = terms["loss"]
            return {"loss": (value / len(batch.examples) * 3, count)}, metrics

        parts.setup_changes["loss"] = loss
    found = finding(verdict_of(only(parts, "accumulation"), corpus)[0], "accumulation")
    assert found.state == ("failed" if is_wrong else "passed"), found.text


# ---------------------------------------------------------------- adapters


def _awake(parts: Parts) -> None:
    """Second matrices that are not zero."""
    with torch.no_grad():
        for name, parameter in parts.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.2)


@pytest.mark.parametrize("make", [lambda: make_parts("lora"), lambda: pairs("lora")], ids=["text", "pairs"])
@pytest.mark.parametrize("is_wrong", [False, True])
def test_an_adapter_begins_as_nothing(is_wrong: bool, make: Callable[[], Parts], corpus: Corpus) -> None:
    parts = only(make(), "start")
    if is_wrong:
        _awake(parts)
    found = finding(verdict_of(parts, corpus)[0], "start")
    assert found.state == ("failed" if is_wrong else "passed"), found.text
    assert ("begins as nothing" in found.text) == (not is_wrong)


def _rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _last_b(tensors: dict[str, torch.Tensor]) -> str:
    return sorted(name for name in tensors if "lora_B" in name)[-1]


UNSAVED: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "missing": lambda tensors: tensors.pop(_last_b(tensors)),
    "as it began": lambda tensors: tensors[_last_b(tensors)].zero_(),
    "rounded": lambda tensors: tensors.update({k: t.to(torch.bfloat16).float() for k, t in tensors.items()}),
}


@pytest.mark.parametrize(("is_frozen", "quantize"), [(False, "none"), (True, "none"), (False, "nf4")])
def test_experts_are_proven_to_be_trained_and_saved(is_frozen: bool, quantize: str, corpus: Corpus) -> None:
    parts = make_parts("lora", quantize, r=4)
    model = replace(parts.config.model, name="mixtral", options={"num_local_experts": 3})
    parts.config = replace(parts.config, model=model)
    parts.model = build_model(model, VOCABULARY, 0).module.train()
    parts.model.generation_config.eos_token_id = VOCABULARY.eos_id
    transform(parts.model, parts.config.adapter, quantize, 0)
    experts = [name for name, each in parts.model.named_parameters() if "experts" in name and each.requires_grad]
    assert len(experts) == 2 * 2 * 2
    if is_frozen:
        parts.model.get_parameter(experts[0]).register_hook(torch.zeros_like)
    verdict, _ = verdict_of(parts, corpus)
    failed = [each for each in verdict.findings if each.state == "failed"]
    assert ["trainable"] * is_frozen == [each.name for each in failed], failed


@pytest.mark.parametrize("how", [None, *UNSAVED])
def test_a_part_of_an_adapter_that_is_not_saved_is_found(how: str | None, corpus: Corpus) -> None:
    parts = only(make_parts("lora", r=4), "reload")
    parts.config = replace(parts.config, optim=replace(parts.config.optim, lr=1e-4))

    def save(model: Any, folder: Path) -> None:
        parts.save_honestly(model, folder)
        if how is not None:
            _rewritten(folder, UNSAVED[how])  # type: ignore[arg-type]

    parts.save = save
    found = finding(verdict_of(parts, corpus)[0], "reload")
    assert found.state == ("passed" if how is None else "failed"), found.text


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_is_saved_with_its_beginning_is_found_again(init: str, corpus: Corpus) -> None:
    found = finding(verdict_of(only(make_parts("lora", r=4, init=init), "reload"), corpus)[0], "reload")
    assert found.state == "passed", found.text


def test_a_large_frozen_base_is_no_reason_to_skip_what_is_trained(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is trained is written; the base is too large to be opened beside itself."""
    parts = only(make_parts("lora", r=4), "reload")
    parts.config = replace(parts.config, model=replace(parts.config.model, path="somewhere"))
    n_base = sum(each.numel() * 4 for each in parts.model.parameters())
    monkeypatch.setattr("kajiya.preflight.prove_saving._MOST_BYTES", n_base - 1)

    def save(model: Any, folder: Path) -> None:
        parts.config = replace(parts.config, model=replace(parts.config.model, path=None))
        parts.save_honestly(model, folder)

    parts.save = save
    found = finding(verdict_of(parts, corpus)[0], "reload")
    assert found.state == "passed", found.text
    assert "not opened here: it is large" in found.text


# ---------------------------------------------------------------- few bits


def test_a_run_beside_a_base_in_few_bits_passes(corpus: Corpus) -> None:
    verdict, _ = verdict_of(make_parts("lora", "nf4", r=4), corpus)
    assert [each.text for each in verdict.failures()] == []


def test_a_base_that_is_opened_in_another_form_is_found(corpus: Corpus) -> None:
    """The adapter's folder names a base that was not rounded to few bits."""
    parts = only(make_parts("lora", "nf4", r=4), "reload")

    def save(model: Any, folder: Path) -> None:
        parts.save_honestly(model, folder)
        path = folder / "base.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantize": "none"}))

    parts.save = save
    found = finding(verdict_of(parts, corpus)[0], "reload")
    assert found.state == "failed", found.text


def test_a_quantized_weight_that_changes_is_found(corpus: Corpus) -> None:
    parts = only(make_parts("lora", "nf4", r=4), "trainable")
    layer = parts.model.model.layers[0].self_attn.q_proj.base_layer

    def drift(_: torch.Tensor) -> None:
        layer.weight.data[0] ^= 1

    first = next(each for name, each in parts.model.named_parameters() if "lora_A" in name)
    first.register_post_accumulate_grad_hook(drift)
    found = finding(verdict_of(parts, corpus)[0], "trainable")
    assert found.state == "failed", found.text
    assert "frozen" in found.text


# ---------------------------------------------------------------- policies


@pytest.mark.parametrize(
    ("wrong", "caught_by"),
    [({}, None), ({"off": -0.5}, "start"), ({"sign": -1.0}, "learning"), ({"sign": 0.0}, "learning")],
)
def test_a_policy_is_proven(wrong: dict[str, float], caught_by: str | None, corpus: Corpus) -> None:
    verdict, _ = verdict_of(only(as_policy(make_parts(), **wrong), "targets", "start", "learning"), corpus)
    assert [each.name for each in verdict.failures()] == ([] if caught_by is None else [caught_by])


@pytest.mark.parametrize("normalize", ["token", "sequence", "constant"])
def test_answers_are_drawn_once_for_all_checks_of_a_policy(normalize: str, corpus: Corpus) -> None:
    parts = as_policy(make_parts(), normalize=normalize)
    drawn = []

    class Drawing(ListLoader):
        def next(self) -> Any:
            drawn.append(self.index)
            return super().next()

    loader = Drawing(parts.batches)
    parts.setup_changes["loader"] = loader
    verdict, _ = verdict_of(parts, corpus)
    assert [each.text for each in verdict.failures()] == []
    assert finding(verdict, "accumulation").figures["difference"] < 1e-4
    assert drawn == [0]
    assert loader.index == 0


# ---------------------------------------------------------------- portions


def test_a_portion_of_examples_is_the_shortest_of_them_whole() -> None:
    batch = make_examples(random_sequences(80, 3, longest=30), k=2, per_row=3)
    batch = replace(batch, labels=torch.arange(40.0), reference=torch.arange(80.0))
    part, model = portion(batch), make_parts().model.eval()
    numbers = part.examples.tolist()
    lengths = torch.bincount(batch.owner[batch.owner >= 0]).view(40, 2).sum(dim=1)
    n_tokens = int(lengths[numbers].sum())
    assert 192 <= n_tokens < 192 + int(lengths.max())
    others = [each for each in range(40) if each not in numbers]
    assert lengths[numbers].max() <= lengths[others].min()
    assert part.labels.tolist() == numbers
    expected = [each for number in numbers for each in (2 * number, 2 * number + 1)]
    assert part.reference.tolist() == expected
    torch.testing.assert_close(log_probs_of(model, part), log_probs_of(model, batch)[expected])
    assert part.rows.tokens.flatten()[part.last].tolist() == batch.rows.tokens.flatten()[batch.last[expected]].tolist()
    assert part.n_targets == int((part.rows.targets != NO_TARGET).sum())


def test_a_portion_of_answers_holds_good_and_bad_ones_to_few_prompts() -> None:
    batch = make_rollouts(6, 1, k=6, old=True, reference=True)
    advantages = torch.linspace(-1, 1, 6).repeat(6)
    advantages[12:18] = 0.0
    batch = replace(batch, advantages=advantages)
    part = portion(batch)
    assert (part.group_size, len(part.advantages)) == (4, 12)
    torch.testing.assert_close(part.advantages, torch.tensor([1.0, 0.6, -0.6, -1.0]).repeat(3))
    log_probs = own_log_probs(make_parts().model, lambda: torch.no_grad(), CPU, 64)
    sums = log_probs(batch.rows).sum(dim=1)
    for value in log_probs(part.rows).sum(dim=1):
        assert float((sums - value).abs().min()) < 1e-5
    first = log_probs(part.rows)
    both = joined(*in_two(part))
    torch.testing.assert_close(log_probs(both.rows)[:8, : first.shape[1]], first[:8])
    assert 4 <= both.n_targets - int((part.rows.targets[:8] != NO_TARGET).sum()) < part.n_targets
    assert torch.equal(both.old != 0, both.rows.targets != NO_TARGET)


# ---------------------------------------------------------------- a module of one's own


class Own(nn.Module):
    """Each token and the sum of those before it, of its segment or of its row."""

    def __init__(self, is_leaking: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY.size, 16)
        self.is_leaking = is_leaking

    def forward(self, tokens: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        seen = (segments[:, :, None] == segments[:, None, :]).tril() if not self.is_leaking else None
        if seen is None:
            seen = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril().expand(len(tokens), -1, -1)
        return (seen.float() @ self.table(tokens)) @ self.table.weight.T


class Blind(nn.Module):
    """It is not told of segments."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY.size, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table(tokens) @ self.table.weight.T


@pytest.mark.parametrize("is_packed_right", [True, False])
def test_documents_that_are_read_from_both_sides_are_kept_apart_too(is_packed_right: bool, corpus: Corpus) -> None:
    parts = only(with_loss(make_parts(), "text", "masked_lm", chunk_tokens=None), "isolation")
    config = ModelConfig(name="bert", n_params="40k", max_positions=64)
    parts.model = build_model(config, VOCABULARY, 0, Task("masked")).module.train()
    parts.batches = [replace(each, is_causal=False) for each in parts.batches]
    if not is_packed_right:
        parts.batches = [replace(each, segments=torch.zeros_like(each.segments)) for each in parts.batches]
    found = finding(verdict_of(parts, corpus)[0], "isolation")
    assert found.state == ("passed" if is_packed_right else "failed"), found.text


def test_a_masked_model_that_sees_the_whole_row_leaks(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kajiya.models.outputs.isolation_inputs", lambda *given, **named: {})
    parts = only(with_loss(make_parts(), "text", "masked_lm", chunk_tokens=None), "isolation")
    config = ModelConfig(name="bert", n_params="40k", max_positions=64)
    parts.model = build_model(config, VOCABULARY, 0, Task("masked")).module.train()
    parts.batches = [replace(each, is_causal=False) for each in parts.batches]
    found = finding(verdict_of(parts, corpus)[0], "isolation")
    assert found.state == "failed"
    assert "moves the logits behind it" in found.text


@pytest.mark.parametrize(
    ("module", "state", "word"),
    [(Own(), "passed", "moves"), (Own(True), "failed", "moves"), (Blind(), "skipped", "takes no `segments`")],
    ids=["kept apart", "leaking", "blind"],
)
def test_a_module_of_ones_own_is_looked_at(module: nn.Module, state: str, word: str, corpus: Corpus) -> None:
    parts = only(make_parts(), "isolation")
    parts.config = replace(parts.config, model=replace(parts.config.model, name="my_pkg:Module"))
    parts.model = module.train()
    found = finding(verdict_of(parts, corpus)[0], "isolation")
    assert found.state == state, found.text
    assert word in found.text
