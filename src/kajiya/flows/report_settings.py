"""What a run was made with: derived values, config, environment, artifacts, attempts, checks; secrets left out."""

import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kajiya.config.quantities import format_bytes, format_seconds
from kajiya.flows.report_facts import ARTIFACTS, RunFacts
from kajiya.flows.report_page import Block, Code, Column, Details, Heading, Notice, Section, Table, Text
from kajiya.flows.report_results import of_run, run_title, why_missing
from kajiya.preflight.subject import SKIPPED_BY_HAND
from kajiya.run.flatten import flatten
from kajiya.run.inspect import moved_words

_SHORT = 12
"""Hex digits of a digest that a table shows."""
SECRET = re.compile(r"(?:api_key|password|secret|token)$", re.IGNORECASE)
_URL_USER = re.compile(r"(://)[^/@\s]+@")


def moment(seconds: float) -> str:
    """Unix seconds as a date and a time in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def by_run(runs: Sequence[RunFacts], blocks: Callable[[RunFacts], Iterator[Block]]) -> list[Block]:
    """The blocks of each run, under its name where there are several."""
    result: list[Block] = []
    for run in runs:
        if len(runs) > 1:
            result.append(Heading(run_title(run, runs)))
        result.extend(blocks(run))
    return result


def public_command(command: Sequence[str]) -> str:
    """The command as a shell takes it, secrets left out."""
    return shlex.join(public_words(command))


def public_words(command: Sequence[str]) -> list[str]:
    """The words of a command, secrets left out."""
    words, hide_next = [], False
    for word in command:
        name, equals, _ = word.partition("=")
        if hide_next:
            word = "…"
        elif equals and SECRET.search(name.replace("-", "_")):
            word = f"{name}=…"
        hide_next = not equals and word.startswith("--") and bool(SECRET.search(word.replace("-", "_")))
        words.append(_URL_USER.sub(r"\1…@", word))
    return words


def public_config(config: Any, name: str = "") -> Any:
    """A config without secrets: keys and passwords are null."""
    if isinstance(config, dict):
        return {key: public_config(value, str(key)) for key, value in config.items()}
    if isinstance(config, list):
        return [public_config(value) for value in config]
    if config is not None and SECRET.search(name):
        return None
    return _URL_USER.sub(r"\1…@", config) if isinstance(config, str) else config


def recipe_text(run: RunFacts) -> str:
    """The resolved config as a recipe file, YAML."""
    import yaml

    head = f"# The resolved config of run {run.id}.\n"
    body: str = yaml.safe_dump(public_config(run.manifest["config"]), sort_keys=False, allow_unicode=True)
    return head + body


# ---------------------------------------------------------------- settings


def derived_section(runs: Sequence[RunFacts]) -> Section:
    """Values of settings that were left open."""
    blocks: list[Block] = []
    for run in runs:
        if not run.manifest.get("derived"):
            blocks.append(Notice(f"{run.label}: nothing derived; {why_missing(run, 'plan')}."))
    values = [dict(run.manifest.get("derived") or {}) for run in runs]
    if any(values):
        blocks.append(Text("What the config left open, settled before the first step and kept by every resume:"))
        blocks.append(_side_by_side("setting", values, runs, number=True))
    return Section("derived", "Derived values", blocks)


def config_section(runs: Sequence[RunFacts]) -> Section:
    """The differences of several configs, and each in full."""
    blocks: list[Block] = []
    flats = [flatten(public_config(run.manifest["config"])) for run in runs]
    if len(runs) > 1:
        names = [name for name in dict.fromkeys(n for flat in flats for n in flat) if _differs(flats, name)]
        if names:
            blocks.append(Text("Settings that differ:"))
            blocks.append(_side_by_side("setting", [{n: f[n] for n in names if n in f} for f in flats], runs))
        else:
            blocks.append(Text("The configs are equal."))
    for run in runs:
        title = f"All {len(flatten(run.manifest['config'])):,} settings" + (
            "" if len(runs) == 1 else f" of {run.label}"
        )
        blocks.append(Details(title, [Code(recipe_text(run), "yaml")]))
    return Section("config", "Config", blocks)


def environment_section(runs: Sequence[RunFacts]) -> Section:
    """Machine, packages, process and git state; what differs between runs stands out."""
    values = []
    for run in runs:
        known = run.manifest["provenance"]
        machine = known["machine"]
        git = known["git"]
        state = "no git checkout around the working directory"
        if git is not None:
            state = git["commit"] + (f", {git['changed_files']:,} files changed" if git["changed_files"] else ", clean")
        process = {f"process: {name}": value for name, value in _process(run).items()}
        values.append(
            {"platform": machine["platform"], "processor": machine["processor"], "usable cores": machine["cores"],
             "memory": format_bytes(machine["memory_bytes"]), "GPUs": _gpu_words(machine), "python": known["python"]}
            | known["packages"] | process | {"git": state, "working directory": known["working_directory"]}
        )  # fmt: skip
    blocks: list[Block] = [_side_by_side("", values, runs)]
    if len(runs) > 1:
        blocks.append(Text("Rows in bold differ.", is_aside=True))
    for run in runs:
        if not _process(run):
            blocks.append(Notice(f"{run.label}: the manifest says nothing of what was set in the process."))
        moved = moved_words(run.manifest)
        if moved:
            words = f"{run.label}: went on with other software or on another machine than it began: {moved}."
            blocks.append(Notice(words, "warn"))
    return Section("environment", "Environment", blocks)


def _process(run: RunFacts) -> dict[str, Any]:
    """What was set in the process of the first attempt; an older Kajiya wrote it beside the provenance."""
    known: dict[str, Any] = run.manifest["provenance"].get("process") or run.manifest.get("process") or {}
    return known


def _gpu_words(machine: Mapping[str, Any]) -> str:
    """Each GPU with its memory and driver."""
    if "gpus" not in machine:
        return "not recorded"
    said = []
    for gpu in machine["gpus"]:
        memory = [] if gpu["memory_bytes"] is None else [format_bytes(gpu["memory_bytes"])]
        said.append(", ".join([gpu["name"], *memory, f"driver {gpu['driver']}"]))
    return "; ".join(said) or "none"


def _differs(values: Sequence[dict[str, Any]], name: str) -> bool:
    return any(name not in each or each[name] != values[0].get(name) for each in values)


def _side_by_side(
    title: str, values: Sequence[dict[str, Any]], runs: Sequence[RunFacts], number: bool = False
) -> Table:
    names = list(dict.fromkeys(name for each in values for name in each))
    columns = [Column(title), *(Column("value" if len(runs) == 1 else run.label, "code") for run in runs)]
    rows = [[name, *(_written(each, name) for each in values)] for name in names]
    different = [row for row, name in enumerate(names) if _differs(values, name)]
    return Table(columns, rows, strong=frozenset(different))


def _written(values: dict[str, Any], name: str) -> str:
    if name not in values:
        return "—"
    value = values[name]
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)


# ---------------------------------------------------------------- lineage


def lineage_section(runs: Sequence[RunFacts]) -> Section:
    """The artifacts, each with what it was made from."""

    def blocks(run: RunFacts) -> Iterator[Block]:
        listed = run.manifest["artifacts"]
        rows = []
        for name, entry in listed.items():
            part = run.parts.get(name)
            if part is None:
                rows.append([name, entry["key"][:_SHORT], entry["digest"][:_SHORT], "cannot be read", "—", "—"])
                continue
            parents = part.manifest["parents"]
            origin = (
                ", ".join(f"{parent} {each['digest'][:8]}" for parent, each in parents.items()) or "nothing: a source"
            )
            size = sum(file["bytes"] for file in part.manifest["files"].values())
            digits = [text[:_SHORT] for text in (entry["key"], entry["digest"], part.manifest["code"])]
            rows.append([name, *digits[:2], origin, digits[2], format_bytes(size)])
        columns = [Column("artifact"), *(Column(title, "code") for title in ("key", "content", "made from", "code"))]
        if rows:
            yield Table([*columns, Column("size", "number")], rows)
        absent = [name for name in ARTIFACTS if name not in listed]
        if absent:
            yield Notice(f"Not there: {', '.join(absent)}; {why_missing(run, absent[-1])}.")

    note = Text(
        f"The first {_SHORT} of 64 hex digits (of a parent 8). The key hashes what an artifact was made from, the content its "
        "files; every file's SHA-256 is in the artifact's manifest.json.",
        is_aside=True,
    )
    return Section("lineage", "Artifacts", [*by_run(runs, blocks), note])


# ---------------------------------------------------------------- attempts, checks, warnings


def attempts_section(runs: Sequence[RunFacts]) -> Section:
    """Every process that worked on the run."""

    def blocks(run: RunFacts) -> Iterator[Block]:
        rows = []
        for number, attempt in enumerate(run.history.attempts, start=1):
            is_last = number == len(run.history.attempts)
            started = "no training" if not attempt.trained else "the beginning"
            if attempt.resumed_from is not None:
                started = f"the checkpoint of step {attempt.resumed_from:,}"
            # The report of a run is written before its last event.
            ended = attempt.ended or (run.status_words if is_last else "ended without a word (killed, or a power cut)")
            words = ended + (f": {attempt.error}" if attempt.error else "")
            span = format_seconds(max(0.0, attempt.latest - attempt.began))
            rows.append([str(number), moment(attempt.began), span, started, words])
        if rows:
            titles = ("attempt", "began", "lasted", "trained from", "ended")
            yield Table([Column(title) for title in titles], rows)
        else:
            yield Notice("The event log tells of no attempt.")

    return Section("attempts", "Attempts", by_run(runs, blocks))


def checks_section(runs: Sequence[RunFacts]) -> Section:
    """Skipped checks in red, and the warnings of the event log."""

    def blocks(run: RunFacts) -> Iterator[Block]:
        notices = list(skipped_checks(run, [run]))
        yield from notices
        if not notices:
            yield Text("No check was skipped.")
        proof = run.manifest.get("proof")
        if proof is not None:
            rows = [[row["name"], row["state"], row["text"]] for row in proof["findings"]]
            # A check that was skipped by hand stands in red as a failed one does.
            failed = frozenset(
                index
                for index, row in enumerate(proof["findings"])
                if row["state"] == "failed" or row["text"] == SKIPPED_BY_HAND
            )
            yield Text(f"Proven before the first step, in {proof['seconds']:.1f} s:")
            yield Table([Column("check"), Column("verdict"), Column("finding")], rows, failed)
        for text, count in run.history.warnings.items():
            yield Notice(text + (f" ({count:,} times)" if count > 1 else ""), "warn")
        if not run.history.warnings:
            yield Text("No warning was given.")

    return Section("checks", "Checks and warnings", by_run(runs, blocks))


def skipped_checks(run: RunFacts, runs: Sequence[RunFacts]) -> Iterator[Notice]:
    """One red line for each check that the config skips."""
    for name in run.manifest["config"]["preflight"]["skip"]:
        yield Notice(
            f"{of_run(run, runs)}The check {name!r} was skipped (preflight.skip): nothing proves what it would have.",
            "bad",
        )


def problems_section(runs: Sequence[RunFacts]) -> Section | None:
    """What the report could not read; `None` when it could read everything."""
    blocks: list[Block] = [
        Notice(("" if len(runs) == 1 else f"{run.label}: ") + text, "bad") for run in runs for text in run.problems
    ]
    return Section("problems", "Problems", blocks) if blocks else None
