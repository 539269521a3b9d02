"""The course of a run: what was asked, the data ledger, the plan beside what happened, time."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kajiya.config.quantities import format_bytes, format_seconds
from kajiya.data.ledger import DataLedger, data_ledger, ledger_table
from kajiya.flows.figures import Bar, BarsData, draw_bars
from kajiya.flows.report_facts import RunFacts
from kajiya.flows.report_page import Block, Code, Column, Details, Heading, Notice, Section, Table, Text
from kajiya.flows.report_results import plot, run_title, why_missing
from kajiya.flows.report_settings import SECRET, by_run, public_command
from kajiya.run.flatten import flatten

# ---------------------------------------------------------------- what was asked


def asked_section(runs: Sequence[RunFacts], recipes: dict[str, str]) -> Section:
    """The recipe and the command; `recipes` holds, by label, the recipe file written beside the report."""

    def blocks(run: RunFacts) -> Iterator[Block]:
        config = run.manifest["config"]
        length = {name: config["train"][name] for name in ("steps", "epochs", "minutes") if config["train"][name]}
        wanted = " and ".join(f"{value:g} {name}" for name, value in length.items())
        source = config["data"]["source"]
        size = config["model"]["n_params"]
        model = config["model"]["path"] or config["model"]["name"] + (f" of {size} parameters" if size else "")
        asked = f"Recipe {config['name']}: {model}, trained for {wanted} on {source['name']}, seed {config['seed']}."
        yield Text(asked)
        if run.manifest["command"]:
            yield Code(public_command(run.manifest["command"]), "sh")
        else:
            yield Notice("Started from Python, not by a command.")
        yield Text("The whole resolved config is written beside this report as a recipe; this repeats the run from it:")
        yield Code(f"kajiya train {recipes[run.label]}", "sh")
        hidden = [name for name, value in flatten(config).items() if value is not None and SECRET.search(name)]
        if hidden:
            yield Notice(f"Not shown, and to be given again: {', '.join(hidden)}.", "warn")

    return Section("asked", "What was asked", by_run(runs, blocks))


# ---------------------------------------------------------------- data


def data_section(runs: Sequence[RunFacts]) -> Section:
    """The ledger of each corpus, and what became tokens."""
    blocks: list[Block] = []
    groups: dict[tuple[str | None, str | None], list[RunFacts]] = {}
    for run in runs:
        groups.setdefault((run.digest("corpus"), run.digest("shards")), []).append(run)
    for group in groups.values():
        if len(groups) > 1:
            blocks.append(Heading("Data of " + ", ".join(run.label for run in group)))
        blocks.extend(_ledger(group[0]))
        blocks.extend(_tokens(group[0]))
    return Section("data", "Data ledger", blocks)


def _ledger(run: RunFacts) -> Iterator[Block]:
    corpus = run.parts.get("corpus")
    if corpus is None:
        yield Notice(f"No ledger: {why_missing(run, 'corpus')}.")
        return
    shards, packing = (run.parts[name].facts if name in run.parts else None for name in ("shards", "packing"))
    ledger = data_ledger(corpus.facts, shards, packing)
    total = ledger.bytes

    def share(n_bytes: int) -> str:
        return f"{n_bytes / total:.1%}" if total else "—"

    sizes = [total, *(line.bytes for line in ledger.lines), sum(line.bytes for line in ledger.lines)]
    rows = [[*row, share(size)] for row, size in zip(ledger_table(ledger), sizes, strict=True)]
    columns = [Column(""), *(Column(title, "number") for title in ("rows", "bytes", "tokens", "share of bytes"))]
    yield Text(_source_words(corpus.facts))
    yield Table(columns, rows, strong=frozenset({0, len(rows) - 1}))
    for problem in ledger.problems:
        yield Notice(f"The ledger does not add up: {problem}.", "bad")
    if not ledger.problems:
        yield Text(
            "It adds up: every row that entered is to train on, held out, or left out for a reason, and every token made of "
            "the former is in their rows or counted as lost. — : it went before it was tokenized.",
            is_aside=True,
        )
    yield from _lost(run, ledger)
    examples = [[line.what, each] for line in ledger.lines for each in line.examples]
    if examples:
        yield Details("Examples of rows left out", [Table([Column("reason"), Column("row", "code")], examples)])


def _lost(run: RunFacts, ledger: DataLedger) -> Iterator[Block]:
    lost = {unit: (n, whole) for unit, (n, whole) in ledger.lost.items() if n}
    limit = run.manifest["config"]["data"]["max_lost_fraction"]
    if not lost:
        yield Text(f"Nothing was lost (up to {limit:.2%} may be: data.max_lost_fraction).", is_aside=True)
        return
    words = ", ".join(f"{n:,} of {whole:,} {unit} ({n / whole:.2%})" for unit, (n, whole) in lost.items())
    worst = max(n / whole for n, whole in lost.values())
    level = "bad" if worst > limit else "info"
    yield Notice(f"Lost: {words}. Up to {limit:.2%} may be lost (data.max_lost_fraction).", level)


def _source_words(facts: dict[str, Any]) -> str:
    source = dict(facts["source"])
    name = source.pop("name", "a source")
    options = source.pop("options", {})
    said = [f"{key}: {value}" for key, value in (flatten(source) | flatten(options)).items() if value is not None]
    details = f" ({'; '.join(said)})" if said else ""
    if facts["heldout_every"] is None:
        held = f"The held-out rows are of a source of their own: {facts['heldout_source']['name']}."
    else:
        held = f"One document in {facts['heldout_every']} is held out, by a hash of its name."
    return f"Source: {name}{details}. {held}"


def _tokens(run: RunFacts) -> Iterator[Block]:
    shards, tokenizer = run.parts.get("shards"), run.parts.get("tokenizer")
    if shards is None:
        yield Notice(f"No token counts: {why_missing(run, 'shards')}.")
        return
    if tokenizer is None:
        yield Notice(f"Nothing to say of the tokenizer: {why_missing(run, 'tokenizer')}.")
    else:
        made = "trained on the training text" if tokenizer.facts["trained"] else "loaded"
        yield Text(f"Tokenizer: {made}, vocabulary {tokenizer.facts['vocab_size']:,}.")
    columns = [
        Column("split"),
        *(Column(title, "number") for title in ("documents", "tokens", "bytes", "bytes per token")),
    ]
    rows = []
    for split, words in (("train", "to train on"), ("heldout", "held out")):
        facts = shards.facts[split]
        rate = f"{facts['bytes'] / facts['tokens']:.3f}" if facts["tokens"] else "—"
        rows.append([words, f"{facts['documents']:,}", f"{facts['tokens']:,}", f"{facts['bytes']:,}", rate])
    yield Table(columns, rows)
    peak = format_bytes(shards.facts["peak_memory_bytes"])
    yield Text(
        f"Encoded by {shards.facts['encoder']}; until then the process took {peak} of memory at most.", is_aside=True
    )


# ---------------------------------------------------------------- plan and time


def plan_section(runs: Sequence[RunFacts]) -> Section:
    """What the plan said, beside what was measured."""
    return Section("plan", "The plan and what happened", by_run(runs, _plan))


def _plan(run: RunFacts) -> Iterator[Block]:
    plan = run.plan
    if plan is None:
        reused = "the model was found in the store, nothing had to be planned"
        yield Notice(f"No plan: {reused if 'model' in run.parts else why_missing(run, 'plan')}.")
        return
    done = _measured(run)

    def row(words: str, planned: float, got: float | None, write: Callable[[float], str]) -> list[str]:
        ratio = "—" if got is None or not planned else f"{got / planned:.2f}"
        return [words, write(planned), "—" if got is None else write(got), ratio]

    def count(value: float) -> str:
        return f"{value:,.0f}"

    rows = [
        row("parameters", plan["n_params"], done["n_params"], count),
        row("steps", plan["steps"], done["steps"], count),
        row("tokens", plan["tokens"], done["tokens"], count),
        row("passes over the training text", plan["epochs"], done["epochs"], lambda value: f"{value:.2f}"),
        row("speed, tokens/s", plan["tokens_per_second"], done["tokens_per_second"], count),
        row("a step, ms", 1000 * plan["step_seconds"], done["step_ms"], count),
        row("time in the loop", plan["train_seconds"], done["train_seconds"], format_seconds),
        row("peak memory", plan["peak_bytes"], None, format_bytes),
        row("a checkpoint", plan["checkpoint_bytes"], done["checkpoint_bytes"], format_bytes),
    ]
    columns = [Column(""), *(Column(title, "number") for title in ("planned", "measured", "measured ÷ planned"))]
    yield Table(columns, rows)
    yield Text(
        f"Precision {plan['precision']}: {plan['precision_reason']}. Compiled: {plan['compiled']}.", is_aside=True
    )
    missing = (
        "" if "model" in run.parts else " Measured figures are those of the last logged step: there is no model yet."
    )
    yield Text(f"Peak memory is measured before training, not during it.{missing}", is_aside=True)


def _measured(run: RunFacts) -> dict[str, float | None]:
    model, shards = run.parts.get("model"), run.parts.get("shards")
    curves = run.history.curves
    tokens = seconds = n_params = speed = None
    if model is not None:
        n_params, tokens, seconds = (model.facts[name] for name in ("n_params", "tokens", "train_seconds"))
        speed = tokens / seconds if seconds else None
    elif curves.get("train/tokens"):
        tokens = curves["train/tokens"][-1][1]
        speeds = [value for _, value in curves.get("train/tokens_per_second", [])]
        speed = len(speeds) / sum(1 / value for value in speeds) if speeds and min(speeds) > 0 else None
        seconds = tokens / speed if speed else None
    steps = run.steps
    per_epoch = shards.facts["train"]["tokens"] if shards is not None else None
    return {
        "n_params": n_params,
        "steps": steps,
        "tokens": tokens,
        "epochs": tokens / per_epoch if tokens is not None and per_epoch else None,
        "tokens_per_second": speed,
        "step_ms": 1000 * run.plan["tokens_per_step"] / speed if speed and run.plan else None,
        "train_seconds": seconds,
        "checkpoint_bytes": run.history.checkpoint_bytes,
    }


def time_section(runs: Sequence[RunFacts]) -> Section:
    """Time for each stage: as recorded by the run, and what its result took when it was made."""
    blocks: list[Block] = []
    for run in runs:
        if len(runs) > 1:
            blocks.append(Heading(run_title(run, runs)))
        blocks.extend(_times(run, "time" if len(runs) == 1 else f"time-{run.label}", list(runs).index(run)))
    return Section("time", "Time", blocks)


def _times(run: RunFacts, name: str, series: int) -> Iterator[Block]:
    timings = run.manifest.get("timings") or {}
    # A stage that an early version, or an attempt cut short, left out of the manifest is still in the log.
    seconds = {stage: end.seconds for stage, end in run.history.stages.items() if stage not in timings} | timings
    if not seconds:
        yield Notice(f"No times: {why_missing(run, 'timings')}.")
        return
    order = ("corpus", "tokenizer", "shards", "plan", "train", "baselines", "evaluation", "report")
    stages = sorted(seconds, key=lambda stage: order.index(stage) if stage in order else len(order))
    total = sum(seconds.values())
    bars = [Bar(stage, seconds[stage], format_seconds(seconds[stage]), series) for stage in stages]
    said = ", ".join(f"{bar.label} {bar.text}" for bar in bars)
    yield plot(name, draw_bars, BarsData("seconds", bars), f"Time by stage: {said}", f"{format_seconds(total)} in all.")
    rows = []
    for stage in stages:
        end = run.history.stages.get(stage)
        part = run.parts.get("model" if stage == "train" else stage)
        made = "—" if part is None or stage == "train" else format_seconds(part.manifest["seconds"])
        share = f"{seconds[stage] / total:.1%}" if total else "—"
        rows.append([stage, "not ended" if end is None else end.state, f"{seconds[stage]:.2f}", share, made])
    rows.append(["all stages", "", f"{total:.2f}", "100.0%" if total else "—", ""])
    columns = [
        Column("stage"),
        Column("was"),
        *(Column(title, "number") for title in ("seconds", "share", "time to make it")),
    ]
    yield Table(columns, rows, strong=frozenset({len(rows) - 1}))
    aside = (
        "Training counts all attempts, with its evaluations and checkpoints. A reused stage costs only its check; "
        "what it took when it was made is in the last column."
    )
    if "report" not in seconds:
        aside += " The writing of this report is not counted."
    yield Text(aside, is_aside=True)
