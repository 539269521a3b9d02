"""Each loss, with what it takes and the model that it needs: trains, is saved, goes on bit for bit."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.training.conftest import (
    VOCABULARY,
    ListLoader,
    NoTokenizer,
    make_batch,
    make_examples,
    make_pairs_of_text,
    make_rollouts,
    random_sequences,
)
from tests.training.test_fit import make_setup

from kajiya.config.schema import AdapterConfig, LossConfig, ModelConfig
from kajiya.config.tables import TABLES, loss_row
from kajiya.data.batch import NO_TARGET
from kajiya.errors import TrainingError
from kajiya.models.adapt import has_adapter, transform
from kajiya.models.adapter_files import Base, save_adapter
from kajiya.models.build import build_model
from kajiya.models.tasks import Task, auto_class
from kajiya.models.weights_digest import weights_digest
from kajiya.training.checkpoint import load_checkpoint, save_checkpoint
from kajiya.training.fit import Setup, fit, train_step
from kajiya.training.losses import load_loss, load_measure
from kajiya.training.losses.sequences import sequence_log_probs
from kajiya.training.state import TrainState

LABELS = {"classify": Task("classes", ("a", "b", "c"))}
LOSSES = sorted(TABLES["loss"])
BEGINNINGS = {"full": ("none", "none"), "lora": ("lora", "none"), "qlora": ("lora", "nf4")}
"""How a model is made trainable: its adapter, and the form of its weights beside it."""
_QUICK = {"lora": ("next_token", "distill", "dpo", "classify", "seq2seq"), "qlora": ("next_token", "kto")}
"""Losses whose adapters are tried in every run of the tests; the others' are slow ones."""
EACH = [
    pytest.param(name, beginning, marks=[] if name in _QUICK.get(beginning, LOSSES) else pytest.mark.slow)
    for beginning in BEGINNINGS
    for name in LOSSES
]


def task_of(name: str) -> Task:
    return LABELS.get(name, Task(loss_row(name).task))


def new_model(name: str, beginning: str = "full", seed: int = 0) -> Any:
    """The model that the loss needs, in training mode."""
    task = task_of(name)
    architecture = {"masked": "bert", "seq2seq": "t5"}.get(task.name, "llama")
    config = ModelConfig(name=architecture, n_params="40k", max_positions=64)
    module = build_model(config, VOCABULARY, seed, task).module
    adapter, quantized = BEGINNINGS[beginning]
    transform(module, AdapterConfig(adapter, {"r": 4, "dropout": 0.1} if adapter == "lora" else {}), quantized, seed)
    return module.train()


def new_batches(name: str, model: Any) -> list[Any]:
    """Three batches of what the loss takes."""
    takes = loss_row(name).takes
    if takes == "tokens":
        return [make_batch(2, seed=seed) for seed in range(3)]
    if takes == "masked":
        rows = [make_batch(2, seed=seed) for seed in range(3)]
        return [
            replace(each, targets=torch.where(each.targets % 3 == 0, each.tokens, NO_TARGET), is_causal=False)
            for each in rows
        ]
    if takes == "prompts":
        return [make_rollouts(2, seed, old=True) for seed in range(3)]
    if takes == "seq2seq":
        return [make_pairs_of_text(3, seed) for seed in range(3)]
    k = 2 if takes == "preference" else 1
    found = []
    for seed in range(3):
        batch = make_examples(random_sequences(4 * k, seed), k=k)
        labels = {
            "classify": torch.tensor([0, 1, 2, 1]),
            "regress": torch.randn(4),
            "kto": torch.tensor([1.0, 0, 1, 0]),
        }
        batch = replace(batch, labels=labels.get(name))
        # With an adapter the reference is the base, by turning it off.
        is_given = loss_row(name).has_reference and not has_adapter(model)
        if is_given:
            batch = replace(batch, reference=_reference(model, batch))
        if name == "kto":
            other = make_examples(random_sequences(4, seed + 9), k=1)
            batch = replace(batch, mismatched=replace(other, reference=_reference(model, other) if is_given else None))
        found.append(batch)
    return found


def _reference(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return sequence_log_probs(model.eval(), batch, 64)[0]


def _setup(name: str, tmp_path: Path, steps: int, beginning: str = "full") -> Setup:
    options: dict[str, Any] = {}
    if name == "distill":
        teacher = tmp_path / "teacher"
        if not teacher.exists():
            new_model("next_token", seed=5).save_pretrained(teacher)
        options = {"teacher": str(teacher)}
    config = LossConfig(name, options)
    torch.manual_seed(0)
    batches = new_batches(name, new_model(name, beginning))
    return make_setup(
        new_model(name, beginning),
        batches,
        loss=load_loss(config),
        measure=load_measure(config),
        steps=steps,
        accumulate=2,
        max_skipped=0,
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize(("name", "beginning"), EACH)
def test_a_loss_trains_is_saved_and_goes_on_bit_for_bit(name: str, beginning: str, tmp_path: Path) -> None:
    whole, state = _setup(name, tmp_path, 12, beginning), TrainState()
    first = _value(whole)
    fit(whole, state, [], lambda: False)
    assert _value(whole) < first

    part, half = _setup(name, tmp_path, 12, beginning), TrainState()
    fit(part, half, [], lambda: half.step == 5)
    folder = save_checkpoint(tmp_path / "checkpoints", half, part.model, part.optimizer, part.loader.state(), "key")
    rest = _setup(name, tmp_path, 12, beginning)
    torch.manual_seed(99)
    resumed, position = load_checkpoint(folder, rest.model, rest.optimizer, "key")
    rest.loader.load_state(position)
    fit(rest, resumed, [], lambda: False)
    for (key, expected), got in zip(whole.model.named_parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(expected, got), key
    assert resumed.window == state.window

    # What is saved is what was trained, as the plain libraries read it.
    again = dict(_saved_and_opened(whole.model, name, beginning, tmp_path).named_parameters())
    trained = {key: each for key, each in whole.model.named_parameters() if each.requires_grad}
    assert len(trained) > 3
    for key, expected in trained.items():
        assert torch.equal(expected, again[key]), key


def _saved_and_opened(model: Any, name: str, beginning: str, tmp_path: Path) -> Any:
    """Written to disk, and read by Transformers or PEFT alone; parameters under the names that they have in `model`."""
    folder = tmp_path / "model"
    if beginning == "full":
        model.save_pretrained(folder)
        return auto_class(task_of(name)).from_pretrained(folder)
    base = tmp_path / "base"
    new_model(name).save_pretrained(base)
    save_adapter(model, NoTokenizer(), folder, Base(str(base), weights_digest(base), BEGINNINGS[beginning][1]))
    plain = auto_class(task_of(name)).from_pretrained(base)
    return PeftModel.from_pretrained(plain, folder).base_model.model


def _value(setup: Setup) -> float:
    """The loss over all batches, dropout off."""
    assert isinstance(setup.loader, ListLoader)
    setup.model.eval()
    total = count = 0.0
    for batch in setup.loader.batches:
        given = batch if setup.measure is None else replace(batch, measured={"kl": 0.0})
        with torch.no_grad():
            ((value, unit),) = setup.loss(setup.model, given)[0].values()
        total, count = total + float(value), count + batch.counts[str(unit)]
    setup.model.train()
    return total / count


def test_examples_count_alike_however_they_are_cut_into_micro_batches(tmp_path: Path) -> None:
    """One batch of 6 pairs, or 2, 1 and 3: the same gradient (a mean of means would show)."""
    model = new_model("dpo")
    sequences = random_sequences(12, 3)
    reference = torch.linspace(-30, -20, 12)
    grads = []
    for cuts in ([0, 12], [0, 4, 6, 12]):
        parts = [slice(a, b) for a, b in pairwise(cuts)]
        batches = [make_examples(sequences[part], k=2, reference=reference[part]) for part in parts]
        setup = make_setup(
            new_model("dpo"), batches, loss=load_loss(LossConfig("dpo")), accumulate=len(batches), clip_norm=None
        )
        captured: list[torch.Tensor] = []
        setup.optimizer.step = lambda lr, setup=setup, captured=captured: captured.extend(  # type: ignore[method-assign]
            g.clone() for g in setup.optimizer.grads()
        )
        train_step(setup, TrainState())
        grads.append(captured)
    assert len(grads[0]) == len(list(model.parameters()))
    for one, three in zip(*grads, strict=True):
        torch.testing.assert_close(one, three, atol=1e-6, rtol=1e-4)


def test_kto_without_its_group_is_refused(tmp_path: Path) -> None:
    setup = _setup("kto", tmp_path, 1)
    with pytest.raises(TrainingError, match="reference point"):
        train_step(replace(setup, measure=None), TrainState())


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_base_with_the_adapter_off_is_the_reference(name: str, tmp_path: Path) -> None:
    """After training, the loss is what it is with the log-probabilities of the base computed beforehand."""
    setup = _setup(name, tmp_path, 4, "lora")
    fit(setup, TrainState(), [], lambda: False)
    base = new_model(name)
    setup.model.eval()
    assert isinstance(setup.loader, ListLoader)
    for batch in setup.loader.batches:
        other = batch.mismatched
        mismatched = None if other is None else replace(other, reference=_reference(base, other))
        known = replace(batch, reference=_reference(base, batch), mismatched=mismatched, measured={"kl": 0.1})
        with torch.no_grad():
            found, expected = (
                setup.loss(setup.model, each)[0] for each in (replace(batch, measured={"kl": 0.1}), known)
            )
            torch.testing.assert_close(found["loss"][0], expected["loss"][0])
            if setup.measure is not None:
                point, wanted = (setup.measure(setup.model, each)["kl"][0] for each in (batch, known))
                torch.testing.assert_close(point, wanted)
    assert not any(each.training for each in setup.model.modules())
    assert {name.split(".")[-2] for name, each in setup.model.named_parameters() if each.requires_grad} == {"default"}
