"""The report of a study: the verdict, the best settings, what mattered, every trial."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kajiya.config.compose import from_plain
from kajiya.config.quantities import format_seconds
from kajiya.errors import StoreError
from kajiya.flows.report import write_page
from kajiya.flows.report_page import Block, Code, Column, Details, Notice, Page, Section, Table, Text, Tiles
from kajiya.flows.report_settings import moment, public_command
from kajiya.flows.tune_figures import (
    short,
)
from kajiya.flows.tune_report_plots import course, mattered
from kajiya.flows.tune_results import THE_RECIPE, best_trials, count_trials, finished, trial_name
from kajiya.flows.tune_search import metric_of, open_study
from kajiya.run.folder import Run
from kajiya.run.status import run_status

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial


def report_study(run: Run, folder: Path | None = None) -> Path:
    """The report of a study as it stands, from its folder alone; `folder`: where it goes, else into the study's own.

    Raises `StoreError` for a study without a trial, or whose storage wants a password.
    """
    config = from_plain(run.manifest()["config"])
    if "…@" in (config.tune.storage or ""):
        raise StoreError(
            f"The storage of {run.id} wants a password, which its folder does not keep.\n"
            "The same `kajiya tune` command writes the report anew."
        )
    study = open_study(config.tune, run.folder, run.id, config.seed)
    if not study.get_trials(deepcopy=False):
        raise StoreError(f"{run.id} has no trial yet.")
    return write_study_report(run, study, [metric_of(each) for each in config.tune.objectives], folder)


def write_study_report(run: Run, study: "Study", metrics: Sequence[str], folder: Path | None = None) -> Path:
    """Write `report.html` and `report.md` into `folder`, else `report/` of the study's own; returns the HTML's path."""
    manifest = run.manifest()
    status = run_status(manifest, run.folder)
    if status.word != "finished":
        manifest["confirmed"] = None  # an earlier end's, of what was the best then
    counts = count_trials(study)
    n = sum(counts.values())
    sections = [
        Section("asked", "What was asked", list(_asked(manifest))),
        Section("best", "The best", list(_best(study, metrics, run, manifest))),
        Section("confirmed", "Beyond the noise?", list(_confirmed(manifest))),
        Section("course", "Course", list(course(study, metrics))),
        Section("settings", "What mattered", list(mattered(study, metrics, manifest))),
        Section("trials", "Trials", list(_trials(study, metrics))),
    ]
    page = Page(
        title=f"{manifest['name']}: search",
        status=status.word,
        status_words="searched" if status.word == "finished" else status.words,
        subtitle=f"{run.id} · begun {moment(manifest['created'])}",
        verdict=_verdict(study, metrics, manifest),
        blocks=[Tiles([(str(n), "configurations tried"), *((str(count), state) for state, count in counts.items())])],
        sections=sections,
        footer=f"Written by Kajiya on {moment(time.time())}, from the study's storage and the runs' manifests.",
    )
    return write_page(page, folder or run.folder / "report")


def _verdict(study: "Study", metrics: Sequence[str], manifest: dict[str, Any]) -> list[str]:
    ranked = best_trials(study)
    if not ranked:
        return ["No trial came to an end: there is nothing to choose from."]
    best = ranked[0]
    if len(metrics) > 1:
        return [f"{len(ranked)} trials are not beaten in all of {', '.join(metrics)} by any other."]
    said = [f"Trial {best.number} is the best of {len(finished(study))}: {metrics[0]} = {best.value:.5g}."]
    confirmed = manifest.get("confirmed")
    return said + [f"{text[0].upper()}{text[1:]}." for text in (confirmed["verdicts"] if confirmed else [])]


def _asked(manifest: dict[str, Any]) -> Iterator[Block]:
    tune = manifest["config"]["tune"]
    yield Code(public_command(manifest["command"]) if manifest["command"] else "(started from Python)", "sh")
    yield Text(
        f"Objective: {', '.join(tune['objectives'])} ({tune['value']} value). Sampler {tune['sampler']['name']}, "
        f"pruner {tune['pruner']['name']}, {tune['parallel']} at once by {tune['launcher']['name']}."
    )
    columns = [Column("setting", "code"), Column("varies over"), Column("scale")]
    rows = [
        [each["key"], _range_words(each), "logarithmic" if each["is_log"] else ""] for each in manifest["dimensions"]
    ]
    if rows:
        yield Table(columns, rows)
    if tune["space"]:
        yield Text(f"Further settings come from {tune['space']}.")


def _range_words(dimension: dict[str, Any]) -> str:
    if dimension["choices"]:
        return ", ".join(str(choice) for choice in dimension["choices"])
    kind = "whole numbers" if dimension["is_int"] else "numbers"
    step = f" in steps of {dimension['step']:g}" if dimension["step"] else ""
    return f"{kind} from {dimension['low']:g} to {dimension['high']:g}{step}"


def _best(study: "Study", metrics: Sequence[str], run: Run, manifest: dict[str, Any]) -> Iterator[Block]:
    ranked = best_trials(study)[:5]
    if not ranked:
        yield Notice("No trial came to an end.", "bad")
        return
    confirmed = manifest.get("confirmed")
    chosen = trial_name(ranked[0]) if confirmed is None else confirmed["chosen"]
    strong = [i for i, trial in enumerate(ranked) if trial_name(trial) == chosen and len(metrics) == 1]
    yield Table(*_trial_table(ranked, metrics), strong=frozenset(strong))
    if run_status(manifest, run.folder).word != "finished":
        yield Text(
            "The search is not over: the same command goes on with it, and writes the best settings as a recipe."
        )
        return
    if len(metrics) > 1:
        yield Text(
            "With several objectives none is the best: `front/` has each of the trials that no other beats in all as a recipe, and "
            "best.yaml is the earliest of them."
        )
        yield Text("This trains, evaluates and reports it:")
    elif chosen == trial_name(ranked[0]):
        yield Text("The best settings are written as a recipe; this trains, evaluates and reports it:")
    else:
        favoured = "the recipe as it was" if chosen == THE_RECIPE else chosen
        yield Notice(f"The fresh seeds favour {favoured} over {trial_name(ranked[0])}, the best of the search.", "warn")
        yield Text("So best.yaml holds that; this trains, evaluates and reports it:")
    yield Code(f"kajiya train {run.folder / 'best.yaml'}", "sh")


def _confirmed(manifest: dict[str, Any]) -> Iterator[Block]:
    found = manifest.get("confirmed")
    if found is None:
        yield Notice(
            "Not run again over fresh seeds (the search is not over or has no best, tune.confirm_seeds is 0, or there are "
            "several objectives)."
        )
        return
    for text in found["verdicts"]:
        yield Text(f"{text[0].upper()}{text[1:]}.")
    rows = [
        [name, str(len(values)), f"{sum(values) / len(values):.5g}", ", ".join(f"{v:.5g}" for v in values)]
        for name, values in found["values"].items()
        if values
    ]
    yield Table([Column(""), Column("seeds", "number"), Column("mean", "number"), Column("values")], rows)
    if found["noise"] is not None:
        yield Text(
            f"The noise floor, the standard deviation over seeds of the best: {found['noise']:.3g}.", is_aside=True
        )
    yield Text(
        "The search chose the best on its own seed, which flatters it; these seeds are fresh. The test is Welch's t-test.",
        is_aside=True,
    )
    for text in found["failed"]:
        yield Notice(f"Left out: {text}", "warn")


def _trials(study: "Study", metrics: Sequence[str]) -> Iterator[Block]:
    trials = study.get_trials(deepcopy=False)
    starts = sorted(t.user_attrs["to_first_step"] for t in trials if t.user_attrs.get("to_first_step"))
    if starts:
        middle = starts[len(starts) // 2]
        yield Text(
            f"From the start of a trial's process to its first step: {format_seconds(middle)} (median).", is_aside=True
        )
    yield Details(f"All {len(trials)} trials", [Table(*_trial_table(trials, metrics))])
    problems = [[str(t.number), str(t.user_attrs["problem"])] for t in trials if "problem" in t.user_attrs]
    if problems:
        yield Text("What went wrong:")
        yield Table([Column("trial", "number"), Column("problem")], problems)


def _trial_table(trials: "Sequence[FrozenTrial]", metrics: Sequence[str]) -> tuple[list[Column], list[list[str]]]:
    keys = list(dict.fromkeys(key for trial in trials for key in trial.user_attrs.get("settings", {})))
    columns = [Column("trial", "number"), Column("ended"), *(Column(name, "number") for name in metrics)]
    columns += [*(Column(key, "number") for key in keys), Column("time", "number"), Column("run", "code")]
    rows = []
    for trial in trials:
        values = [f"{value:.5g}" for value in trial.values] if trial.values else ["—"] * len(metrics)
        settings = trial.user_attrs.get("settings", {})
        chosen = [short(settings[key]) if key in settings else "—" for key in keys]
        seconds = trial.user_attrs.get("seconds")
        ended = {"COMPLETE": "finished", "PRUNED": "pruned"}.get(trial.state.name)
        ended = ended or trial.user_attrs.get("status") or trial.user_attrs.get("problem") or trial.state.name.lower()
        if "continues" in trial.user_attrs:
            ended += f" (went on from {trial.user_attrs['continues']})"
        span = format_seconds(seconds) if seconds else "—"
        rows.append([str(trial.number), ended, *values, *chosen, span, str(trial.user_attrs.get("run") or "—")])
    return columns, rows
