"""The evaluation of a model that is not judged by the bits of a text: its loss and metrics on all held-out rows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kajiya.config.digest import digest
from kajiya.config.schema import Config
from kajiya.config.tables import TABLES, loss_row
from kajiya.data.render import read_template
from kajiya.data.tokenizer import load_tokenizer
from kajiya.evals.answers import Answer
from kajiya.evals.fingerprint import Fingerprint, heldout_digest
from kajiya.evals.metrics import Measured
from kajiya.evals.results import answer_columns, figure_of, measure, write_rows
from kajiya.evals.run_task import task_revision
from kajiya.evals.scoring import evaluation_mode
from kajiya.evals.statistics import ratio_scores
from kajiya.evals.tasks import Task
from kajiya.flows.bases import loss_without_place
from kajiya.flows.feeding import Data, open_feeding, task_of
from kajiya.flows.heldout import Scorer, Sums, score_batches
from kajiya.flows.own_module import rebuild_own_module
from kajiya.flows.rolling import HeldoutReward, open_rollouts
from kajiya.flows.teaching import load_run_loss
from kajiya.models.open import model_dtype, open_model
from kajiya.models.outputs import decoder_start, sequence_logits
from kajiya.run.code import code_revision, own_code
from kajiya.run.files import write_json
from kajiya.run.store import Artifact, Store, produce
from kajiya.training.losses import load_measure
from kajiya.training.precision import Precision, resolve_device, resolve_precision

_FIRST = ("reward", "loss", "accuracy", "rewards/accuracies", "absolute_error", "nll")
"""Metrics that stand before the others."""
_LOWER = ("loss", "nll", "squared_error", "absolute_error")
"""Metrics that are better where they are lower."""
_SHARES = ("accuracy", "rewards/accuracies")
_HIGHER = (*_SHARES, "rewards/margins")
_LABELS = {
    "classify": Task("held-out rows", "", "", ("accuracy", "macro_f1", "auroc", "ece"), kind="choose"),
    "regress": Task("held-out rows", "", "", ("rmse", "r2")),
}
"""What is measured of answers beside what the loss tells, by loss."""


def is_judged_by_bits(config: Config, corpus: Artifact) -> bool:
    """Whether the model is one of plain text, whose figure is bits per byte."""
    row = loss_row(config.train.loss.name)
    return row.takes == "tokens" and corpus.facts["format"] == "text"


def evaluate_kind(
    config: Config, model: Artifact, data: Data, reference: Artifact | None, store: Store
) -> tuple[Artifact, bool]:
    """The loss and its metrics on all held-out rows, and whether they were there already.

    Files: `figures.json`, of each metric its figure, its 95 % interval (whole sources resampled; `null` from one) and the
    number of units that it is over; `rows.parquet`, what they are made of, row by row, for paired tests.
    """
    device = resolve_device(config.train.device, "train.device")
    precision = resolve_precision(str(model.facts["derived"]["train.precision"]), device)
    fingerprint = _fingerprint(config, model, data, reference, precision)

    def make(folder: Path) -> dict[str, Any]:
        module = rebuild_own_module(config, model, data.tokenizer)
        if module is None:
            module = open_model(model.path, model_dtype(model.path), task=task_of(config, data.corpus))
        found = _measured(config, data, reference, module.to(device), precision, store)
        figures = {
            name: _figure(name, each, found, config) for name, each in sorted(found.measured.items(), key=_place)
        }
        write_rows(folder, found.columns, found.measured, found.sources)
        write_json(folder / "figures.json", figures)
        task = _LABELS.get(config.train.loss.name)
        n_rows = len(found.columns["row"])
        facts = {
            "task": "held-out rows", "loss": config.train.loss.name, "n_rows": n_rows,
            "n_groups": len(set(found.sources)) if found.sources else n_rows, "figures": figures,
            "fingerprint": asdict(fingerprint), "note": None,
        }  # fmt: skip
        return facts if task is None else facts | {"settings": task.settings()}

    parents = data.parents() | {"model": model}
    return produce(
        store,
        "evaluation",
        code=_revision(config),
        config={
            "loss": loss_without_place(config.train.loss),
            "row_tokens": config.data.row_tokens,
            "fingerprint": asdict(fingerprint),
        },
        parents=parents if reference is None else parents | {"reference": reference},
        make=make,
    )


def _fingerprint(
    config: Config, model: Artifact, data: Data, reference: Artifact | None, precision: Precision
) -> Fingerprint:
    loss = config.train.loss
    row = loss_row(loss.name)
    said = {
        "loss": loss_without_place(loss),
        "render": replace(config.data.render, template=read_template(config.data.render)),
        "rows": [config.data.row_tokens, config.data.on_long],
        # What is a mean over tokens depends on which these are; what is hidden, and drawn, on the seed.
        "tokenizer": None if row.takes in ("labelled", "prompts") else data.tokenizer.digest,
        "seed": config.seed if row.takes in ("masked", "prompts") else None,
        "compared_with": [each.digest for each in (reference, data.bases.get("base")) if each]
        if row.has_reference
        else None,
    }
    return Fingerprint(
        data=heldout_digest(data.corpus),
        template=digest(said),
        code=digest(own_code(_functions(config))),
        engine="torch",
        dtype=precision.name,
        sampling="as the loss says" if row.takes == "prompts" else "none",
        model=model.digest,
    )


def _functions(config: Config) -> list[str]:
    """The loss, and the rewards that it names."""
    loss = config.train.loss
    rewards = loss.options["rewards"] if loss_row(loss.name).takes == "prompts" else []
    return [loss.name, *(each["name"] for each in rewards)]


def _revision(config: Config) -> str:
    """The revision of all that scores: losses, rewards and metrics are found by name alone."""
    loss, *rewards = _functions(config)
    named = [("loss", loss), *(("reward", name) for name in rewards)]
    targets = [TABLES[table][name].target for table, name in named if ":" not in name]
    modules = sorted({target.partition(":")[0] for target in targets})
    task = _LABELS.get(loss)
    revision = code_revision("kajiya.flows.kind_evaluation", *modules)
    return revision if task is None else digest([revision, task_revision(task)])[:16]


# ---------------------------------------------------------------- figures and rows


@dataclass(frozen=True)
class _Found:
    measured: dict[str, Measured]
    columns: Mapping[str, list[Any]]
    sources: Sequence[str] | None
    """Of each row; `None` where rows stand alone."""


def _measured(
    config: Config, data: Data, reference: Artifact | None, module: Any, precision: Precision, store: Store
) -> _Found:
    """The rewards of answers to all held-out prompts, or the loss and its metrics on all held-out rows."""
    device = next(module.parameters()).device
    if loss_row(config.train.loss.name).takes == "prompts":
        asked = HeldoutReward(open_rollouts(config, data, module, precision, device), None)
        return _Found(_of_sums(asked.measure()[0]), {"row": asked.texts()}, None)
    feeding = open_feeding(config, data, reference, decoder_start(module))
    names, batches = (list(each) for each in zip(*feeding.examples(), strict=True))
    loss, _ = load_run_loss(config, data, device, store)
    scorer = Scorer(loss, load_measure(config.train.loss), device, precision)
    measured = _of_sums(score_batches(module, batches, scorer))
    sources = [source_of(name) for name in names]
    task = _LABELS.get(config.train.loss.name)
    if task is None:
        return _Found(measured, {"row": names}, sources)
    labelled = _Labelled(data, config.train.loss.name, names, batches)
    answers = labelled.answers(module, precision)
    return _Found(measured | measure(task, answers), answer_columns(answers), sources)


def source_of(name: str) -> str:
    """The file of a row named `file:function`; a row named by its line (`file:12`) stands for itself."""
    file, _, place = name.partition(":")
    return name if not place or place.isdigit() else file


def _of_sums(sums: Mapping[str, Sums]) -> dict[str, Measured]:
    def measured(name: str, each: Sums) -> Measured:
        points = 100.0 if name in _SHARES else each.points
        return Measured(ratio_scores(each.totals, each.counts, name in _LOWER, points))

    return {name: measured(name, each) for name, each in sums.items()}


def _figure(name: str, measured: Measured, found: _Found, config: Config) -> dict[str, Any]:
    scores = measured.scores
    n = float(scores.rows[:, 1].sum()) if scores.is_mean else float(len(scores.rows))
    task = _LABELS.get(config.train.loss.name)
    is_reward = loss_row(config.train.loss.name).takes == "prompts" and name.startswith("reward")
    is_judged = is_reward or name in (*_LOWER, *_HIGHER) or (task is not None and name in task.metrics)
    return figure_of(measured, found.sources) | {"n": n, "is_judged": is_judged}


def _place(item: tuple[str, Measured]) -> int:
    return _FIRST.index(item[0]) if item[0] in _FIRST else len(_FIRST)


@dataclass(frozen=True)
class _Labelled:
    """Held-out examples with their labels, one a batch."""

    data: Data
    loss: str
    names: Sequence[str]
    batches: Sequence[Any]

    def answers(self, module: Any, precision: Precision) -> list[Answer]:
        """What the model's head says of each."""
        device = next(module.parameters()).device
        vocabulary = load_tokenizer(self.data.tokenizer.path)
        found = []
        with evaluation_mode(module), torch.no_grad():
            for name, batch in zip(self.names, self.batches, strict=True):
                with precision.context(device):
                    outputs_C = sequence_logits(module, batch.to(device))[0].float().cpu()
                ids = batch.rows.tokens[batch.owner >= 0].tolist()
                text = str(vocabulary.decode(ids, skip_special_tokens=True))
                found.append(self._answer({"name": name}, text, outputs_C, batch.labels[0].item()))
        return found

    def _answer(self, row: dict[str, str], text: str, outputs_C: torch.Tensor, label: float) -> Answer:
        if self.loss == "regress":
            return Answer(row, text, repr(float(label)), (repr(float(outputs_C.reshape(-1)[0])),))
        classes = tuple(str(each).strip() for each in self.data.corpus.facts["classes"])
        logprobs = tuple(outputs_C.double().log_softmax(0).tolist())
        picked = classes[int(np.argmax(logprobs))]
        return Answer(row, text, classes[int(label)], (picked,), classes, logprobs, (1,) * len(classes))
