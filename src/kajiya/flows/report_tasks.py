"""The tasks that models were evaluated on, with intervals and paired verdicts: of runs, and of any other model in the store."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kajiya.errors import KajiyaError, StoreError
from kajiya.evals.results import TaskResult, compare_results, compared_words, text_result
from kajiya.flows.report_confusion import confusion_blocks
from kajiya.flows.report_facts import RunFacts
from kajiya.flows.report_page import Block, Column, Details, Heading, Notice, Section, Table, Text
from kajiya.flows.report_results import run_title
from kajiya.run.store import Artifact, Store

_TASK = "task "
_FOLDED = 12
"""Figures of a task past which its table is folded, and verdicts end: a group of lm-eval has hundreds."""


@dataclass(frozen=True)
class Scored:
    """A model and what it was evaluated on."""

    label: str
    title: str
    results: Sequence[TaskResult]


def scored_runs(runs: Sequence[RunFacts], *, with_text: bool) -> list[Scored]:
    """The tasks of each run; `with_text`, its held-out text beside them, for models that are no run's."""
    found = []
    for run in runs:
        results = [TaskResult(part.folder, part.facts) for name, part in run.parts.items() if name.startswith(_TASK)]
        if with_text and run.evaluation is not None:
            part = run.parts["evaluation"]
            results.insert(0, text_result(part.folder, part.facts))
        found.append(Scored(run.label, run_title(run, runs), results))
    return found


def find_scored(target: str, model: Artifact | None, store: Store, label: str) -> Scored:
    """All that the store holds of a model that is no run's, or (`None`) of the models behind an endpoint's address.

    Of evaluations that differ in nothing, the newest. Raises `StoreError` where there is none.
    """
    newest: dict[tuple[str, ...], TaskResult] = {}
    for artifact in store.artifacts():
        result = _result(artifact)
        if result is None:
            continue
        of = result.fingerprint.model
        is_its = of.startswith(f"{target.rstrip('/')} ") if model is None else of == model.digest
        if is_its:
            newest[(result.task, *result.fingerprint.manner)] = result
    if not newest:
        raise StoreError(f"{target}: {store.root} holds no evaluation of it.\nEvaluate it first: kajiya eval {target}")
    return Scored(label, f"{label} · {target}", list(newest.values()))


def _result(artifact: Artifact) -> TaskResult | None:
    """The artifact as a result; `None` of another stage, and of an older version, which did not say all that it was made with."""
    if artifact.stage not in ("evaluation", "task") or "fingerprint" not in artifact.facts:
        return None
    if "code" not in artifact.facts["fingerprint"]:
        return None
    if "bits_per_byte" in artifact.facts:
        return text_result(artifact.path, artifact.facts)
    return TaskResult(artifact.path, artifact.facts)


def tasks_section(scored: Sequence[Scored]) -> Section | None:
    """A table for each way of evaluating, never two ways in one; `None` where there was no task."""
    found: dict[tuple[str, ...], list[tuple[Scored, TaskResult]]] = {}
    for each in scored:
        for result in each.results:
            found.setdefault((result.task, *result.fingerprint.manner), []).append((each, result))
    if not found:
        return None
    blocks: list[Block] = []
    for name in dict.fromkeys(key[0] for key in found):
        blocks.append(Heading(name))
        groups = [group for key, group in found.items() if key[0] == name]
        if len(groups) > 1:
            words = "These evaluations differ in their rows, prompts, code, engine, precision or sampling: figures of different "
            blocks.append(Notice(words + "tables cannot be compared.", "warn"))
        for group in groups:
            blocks.extend(_task_blocks(group))
    return Section("tasks", "Tasks", blocks)


def _task_blocks(group: list[tuple[Scored, TaskResult]]) -> Iterator[Block]:
    columns = [Column(""), Column("metric"), Column("figure", "number"), Column("95 % interval", "number"),
               Column("rows", "number"), Column("computed as")]  # fmt: skip
    rows = []
    for each, result in group:
        for metric, figure in result.figures.items():
            value, bounds = figure["value"], figure["interval"]
            rows.append([
                each.title, metric, "—" if value is None else f"{value:.4g}",
                "—" if bounds is None else f"{bounds[0]:.4g} – {bounds[1]:.4g}", f"{result.facts['n_rows']:,}",
                figure["signature"],
            ])  # fmt: skip
    first, *others = group
    is_long = len(first[1].figures) > _FOLDED
    yield Details(f"{len(rows):,} figures", [Table(columns, rows)]) if is_long else Table(columns, rows)
    for each, result in group:
        for figure in result.figures.values():
            yield from confusion_blocks(figure["details"], each.title)
    for each, result in others:
        for metric in list(result.figures)[:_FOLDED]:
            yield _verdict(first, (each, result), metric)


def _verdict(first: tuple[Scored, TaskResult], other: tuple[Scored, TaskResult], metric: str) -> Block:
    names = first[0].label, other[0].label
    try:
        found = compare_results(first[1], other[1], metric)
    except (KajiyaError, OSError, KeyError) as problem:
        return Notice(f"{metric}: {names[0]} and {names[1]} are not compared: {problem}", "warn")
    return Text(f"{metric}: {compared_words(first[1], found, metric, names)}.")
