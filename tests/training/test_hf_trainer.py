"""One step against the Hugging Face `Trainer` on the same rows: loss and every gradient; masked targets in closed form."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.conftest import VOCABULARY
from tests.training.test_fit import make_setup

from kajiya.data.batch import NO_TARGET, Batch
from kajiya.training.fit import train_step
from kajiya.training.state import TrainState
from kajiya.training.terms import drain_window

Make = Callable[..., Any]
ROWS, TOKENS, MICRO = 8, 16, 2


def _rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels as the Trainer has them: of the same length, unshifted, −100 where nothing is learnt; very uneven by row."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY.size, (ROWS, TOKENS), generator=generator)
    labels = ids.clone()
    kept = torch.tensor([0.1 if row % 3 else 1.0 for row in range(ROWS)])[:, None]
    labels[torch.rand(ids.shape, generator=generator) > kept] = NO_TARGET
    labels[:, 0] = NO_TARGET
    labels[0, 5] = ids[0, 5]
    return ids, labels


def _batch(ids: torch.Tensor, labels: torch.Tensor) -> Batch:
    """The same in this project's terms: each token's target is the next one's label."""
    targets = torch.full_like(labels, NO_TARGET)
    targets[:, :-1] = labels[:, 1:]
    place = torch.arange(ids.shape[1]).expand(ids.shape)
    return Batch(ids, targets, place.contiguous(), torch.zeros_like(ids), int((targets != NO_TARGET).sum()))


def _trainers(model: Any, folder: Path, accumulate: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the Trainer's first step."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ids, labels = _rows()
    rows = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
    gradients: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})

    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=ROWS // accumulate,
        gradient_accumulation_steps=accumulate,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[Keep()])
    trainer.train()
    return float(trainer.state.log_history[0]["loss"]), gradients


def _ours(model: Any, accumulate: int) -> tuple[float, dict[str, torch.Tensor]]:
    ids, labels = _rows()
    size = ROWS // accumulate
    batches = [_batch(ids[at : at + size], labels[at : at + size]) for at in range(0, ROWS, size)]
    setup = make_setup(model, batches, accumulate=accumulate, clip_norm=None)
    gradients: dict[str, torch.Tensor] = {}
    setup.optimizer.step = lambda lr: gradients.update(  # type: ignore[method-assign]
        {name: p.grad.clone() for name, p in setup.optimizer.parameters.items() if p.grad is not None}
    )
    state = TrainState()
    train_step(setup, state)
    return drain_window(state)["train/nll"], gradients


@pytest.mark.parametrize("accumulate", [1, 4])
def test_loss_and_gradients_of_a_step_are_the_trainers(accumulate: int, tiny_model: Make, tmp_path: Path) -> None:
    theirs, their_gradients = _trainers(tiny_model(), tmp_path, accumulate)
    ours, gradients = _ours(tiny_model(), accumulate)
    assert ours == pytest.approx(theirs, abs=2e-4), "the Trainer rounds what it logs to four digits"
    assert gradients.keys() == their_gradients.keys()
    assert len(gradients) > 10
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_masked_data_have_the_closed_form(accumulate: int, tiny_model: Make) -> None:
    """A head of zeros gives every token 1 / V: the loss is ln V, and the head's gradient Σ (1 / V − [v = target]) h / n."""
    model = tiny_model(tied=False)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head.zero_()
    ids, labels = _rows()
    batch = _batch(ids, labels)
    hidden = model.model(input_ids=ids).last_hidden_state.detach()
    wanted = batch.targets != NO_TARGET
    residual = torch.full((int(wanted.sum()), VOCABULARY.size), 1 / VOCABULARY.size)
    residual[torch.arange(len(residual)), batch.targets[wanted]] -= 1
    expected = residual.T @ hidden[wanted] / batch.n_targets
    loss, gradients = _ours(model, accumulate)
    assert loss == pytest.approx(math.log(VOCABULARY.size), rel=1e-6)
    torch.testing.assert_close(gradients["lm_head.weight"], expected, rtol=1e-4, atol=1e-7)
    assert all(float(gradient.abs().max()) == 0 for name, gradient in gradients.items() if name != "lm_head.weight")
