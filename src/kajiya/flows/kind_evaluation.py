"""The evaluation of a model that is not judged by the bits of a text: its loss and metrics on all held-out rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kajiya.config.schema import Config
from kajiya.config.tables import loss_row
from kajiya.flows.bases import loss_without_place
from kajiya.flows.feeding import Data, open_feeding, task_of
from kajiya.flows.heldout import Scorer, Sums, score_batches
from kajiya.flows.own_module import rebuild_own_module
from kajiya.flows.rolling import HeldoutReward, open_rollouts
from kajiya.flows.teaching import load_run_loss
from kajiya.models.open import model_dtype, open_model
from kajiya.models.outputs import decoder_start
from kajiya.run.code import code_revision
from kajiya.run.files import write_json
from kajiya.run.store import Artifact, Store, produce
from kajiya.training.losses import load_measure
from kajiya.training.precision import Precision, resolve_device, resolve_precision

_FIRST = ("reward", "loss", "accuracy", "rewards/accuracies", "absolute_error", "nll")
"""Metrics that stand before the others."""


def is_judged_by_bits(config: Config, data: Data) -> bool:
    """Whether the model is one of plain text, whose figure is bits per byte."""
    row = loss_row(config.train.loss.name)
    return row.takes == "tokens" and data.corpus.facts["format"] == "text"


def evaluate_kind(
    config: Config, model: Artifact, data: Data, reference: Artifact | None, store: Store
) -> tuple[Artifact, bool]:
    """The loss and its metrics on all held-out rows, and whether they were there already.

    `figures.json`: of each metric its mean, its 95 % interval (whole batches resampled; `null` from one batch) and the number of
    units that it is a mean over.
    """

    def make(folder: Path) -> dict[str, Any]:
        module = rebuild_own_module(config, model, data.tokenizer)
        if module is None:
            module = open_model(model.path, model_dtype(model.path), task=task_of(config, data.corpus))
        device = resolve_device(config.train.device, "train.device")
        precision = resolve_precision(str(model.facts["derived"]["train.precision"]), device)
        module = module.to(device)
        sums = _sums(config, data, reference, module, precision, store)
        figures = {
            name: {"value": each.mean, "interval": each.interval(), "n": float(each.counts.sum())}
            for name, each in sorted(
                sums.items(), key=lambda item: _FIRST.index(item[0]) if item[0] in _FIRST else len(_FIRST)
            )
        }
        write_json(folder / "figures.json", figures)
        n_batches = max(len(each.totals) for each in sums.values())
        return {"loss": config.train.loss.name, "n_batches": n_batches, "figures": figures, "note": None}

    parents = data.parents() | {"model": model}
    return produce(
        store,
        "evaluation",
        code=code_revision("kajiya.flows.kind_evaluation"),
        config={
            "loss": loss_without_place(config.train.loss),
            "micro_batch": config.train.micro_batch,
            "row_tokens": config.data.row_tokens,
        },
        parents=parents if reference is None else parents | {"reference": reference},
        make=make,
    )


def _sums(
    config: Config, data: Data, reference: Artifact | None, module: Any, precision: Precision, store: Store
) -> Mapping[str, Sums]:
    """The rewards of answers to all held-out prompts, or the loss and its metrics on all held-out rows."""
    device = next(module.parameters()).device
    if loss_row(config.train.loss.name).takes == "prompts":
        return HeldoutReward(open_rollouts(config, data, module, precision, device), None).measure()[0]
    feeding = open_feeding(config, data, reference, decoder_start(module))
    loss, _ = load_run_loss(config, data, device, store)
    scorer = Scorer(loss, load_measure(config.train.loss), device, precision)
    return score_batches(module, list(feeding.heldout()), scorer)
