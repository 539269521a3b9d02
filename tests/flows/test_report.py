"""The report: complete, exact, escaped, self-contained; what a run lacks is said, never left out."""

import json
import math
import re
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from scipy import stats

from kajiya.config.compose import compose
from kajiya.config.digest import digest
from kajiya.config.schema import Config, EvalConfig, OptimConfig, PreflightConfig, ServeConfig
from kajiya.errors import MissingExtraError, StoreError
from kajiya.flows import figure_files
from kajiya.flows.report import save_figure_files, write_report
from kajiya.flows.run_history import read_history
from kajiya.run.files import read_json
from kajiya.run.folder import Run, open_run
from kajiya.run.store import Artifact, Store, produce, remove_artifact

LN2 = math.log(2)
FINGERPRINT = dict.fromkeys(("data", "template", "code", "engine", "dtype", "sampling", "model"), "alike")


# ---------------------------------------------------------------- a store with runs, made without training


@dataclass(frozen=True)
class Made:
    """What a run of the tests has come to."""

    name: str = "tiny"
    seed: int = 0
    n_documents: int = 20
    bits: float = 1.2
    """Bits per byte of the model, about."""
    steps: int = 100
    stages: tuple[str, ...] = ("corpus", "tokenizer", "shards", "plan", "train", "model", "baselines", "evaluation")
    status: str = "finished"
    samples: Sequence[Mapping[str, str]] = (
        {"name": "f", "prompt": "def f():\n", "body": "    return 1\n", "completion": "    x"},
    )
    note: str | None = None
    dropped: Mapping[str, int] = field(
        default_factory=lambda: {"nothing in it": 3, "near-duplicate of a held-out document": 7}
    )
    command: tuple[str, ...] = ("kajiya", "train", "tiny", "optim.lr=1e-3")
    config: Config | None = None
    events: Sequence[tuple[str, dict[str, Any]]] = ()
    """Emitted before the run's own metrics."""

    @property
    def settings(self) -> Config:
        return self.config or Config(name=self.name, seed=self.seed)


PROCESS = {"seed": 0, "threads": 2}


def make_run(root: Path, made: Made) -> Run:
    store = Store(root)
    parts = {name: build(store, made) for name, build in BUILDERS.items() if name in made.stages}
    run = open_run(store, made.settings, digest([made.name, made.seed, made.steps]), list(made.command), PROCESS)
    run.record(attempts=1)
    for name, artifact in parts.items():
        run.record_artifact(name, artifact)
    plan = plan_of(made)
    if "plan" in made.stages:
        run.record(plan=plan, derived={"model.n_layers": 4, "train.steps": made.steps, "train.precision": "fp32"})
    for kind, fields in made.events:
        run.events.emit(kind, **fields)
    if "train" in made.stages:
        run.events.emit("started", attempt=1, resumed_from=None)
        for step in range(10, made.steps + 1, 10):
            values = {"train/nll": loss_at(step), "train/lr": 1e-3, "train/tokens": step * 512}
            run.events.emit("metrics", step=step, values=values | {"train/tokens_per_second": 5000.0})
            if step % 20 == 0:
                run.events.emit("metrics", step=step, values={"eval/nll": loss_at(step) + 0.1})
    seconds = {name: 1.5 + len(name) for name in made.stages if name not in ("plan", "model")}
    for name, each in seconds.items():
        run.events.emit("stage", name=name, state="done", seconds=each, text="")
    run.record(status=made.status, timings=seconds)
    run.events.emit("ended", status=made.status, error=None)
    return run


def loss_at(step: int) -> float:
    return 2 + 6 * math.exp(-step / 40)


def plan_of(made: Made) -> dict[str, Any]:
    return {
        "n_params": 500_352, "n_trainable": 500_352, "steps": 100, "tokens_per_step": 512, "tokens": 51_200, "epochs": 0.5,
        "tokens_per_param": 0.1, "flops_per_token": 3e6, "step_seconds": 0.1, "warmup_seconds": 0.5, "train_seconds": 10.0,
        "tokens_per_second": 5120.0, "peak_bytes": 2**29, "state_bytes": 2**22, "checkpoint_bytes": 2**22,
        "precision": "fp32", "precision_reason": "no AMX", "compiled": "no: too short",
        "lr_curve": [[step, 1e-3] for step in range(1, 101)],
    }  # fmt: skip


def build_corpus(store: Store, made: Made) -> Artifact:
    return put(store, "corpus", made, corpus_facts(made))


def corpus_facts(made: Made) -> dict[str, Any]:
    dropped = {
        reason: {"documents": count, "bytes": 10 * count, "examples": ["a.py"], "kind": KINDS_OF[reason]}
        for reason, count in made.dropped.items()
    }
    n_heldout = sum(size for _, size, _ in documents_of(made))
    lost = sum(made.dropped.values())
    ledger = {
        "entered": {"documents": 400 + made.n_documents + lost, "bytes": 900_000 + n_heldout + 10 * lost},
        "train": {"documents": 400, "bytes": 900_000},
        "heldout": {"documents": made.n_documents, "bytes": n_heldout},
        "dropped": dropped,
    }
    return {"source": {"name": "stdlib", "options": {"root": None}}, "heldout_every": 20, "ledger": ledger}


KINDS_OF = {
    "nothing in it": "empty",
    "near-duplicate of a held-out document": "contaminated",
    "unreadable": "lost",
}


def build_tokenizer(store: Store, made: Made) -> Artifact:
    return put(store, "tokenizer", made, {"trained": True, "vocab_size": 8192})


def build_shards(store: Store, made: Made) -> Artifact:
    split = {"documents": 400, "tokens": 102_400, "bytes": 900_000}
    heldout = {"documents": made.n_documents, "bytes": sum(size for _, size, _ in documents_of(made))}
    facts = {"train": split, "heldout": split | heldout, "encoder": "tokenizers", "peak_memory_bytes": 300 * 2**20}
    return put(store, "shards", made, facts)


def build_model(store: Store, made: Made) -> Artifact:
    facts = {
        "n_params": 500_352, "steps": made.steps, "tokens": made.steps * 512, "targets": 1, "skipped_steps": 0,
        "train_seconds": 12.5, "best_heldout_loss": 2.1, "best_step": made.steps, "derived": {"train.device": "cpu"},
    }  # fmt: skip
    return put(store, "model", made, facts)


def build_baselines(store: Store, made: Made) -> Artifact:
    n_bytes = sum(size for _, size, _ in documents_of(made))
    rows = {"xz": 1.684, "xz-primed": 1.302}
    figures = {name: {"bits_per_byte": bits, "seconds": 0.5, "n_bytes": n_bytes} for name, bits in rows.items()}
    return put(store, "baselines", made, {"baselines": figures}, {"baselines.json": json.dumps(figures)})


def build_evaluation(store: Store, made: Made) -> Artifact:
    rows = documents_of(made)
    nats, n_bytes = sum(row[2] for row in rows), sum(row[1] for row in rows)
    bits = nats / LN2 / n_bytes
    low, high = (bits, bits) if len(rows) == 1 else (bits - 0.04, bits + 0.05)
    figures = {
        "bits_per_byte": bits, "bits_per_byte_interval": [low, high], "perplexity": 31.25, "perplexity_interval": [30.0, 33.0],
        "nats": nats, "n_bytes": n_bytes, "n_tokens": n_bytes // 3, "n_documents": len(rows), "context_tokens": 128,
        "dtype": "float32", "seconds": 1.25, "fingerprint": FINGERPRINT,
    }  # fmt: skip
    samples = [{"document": "held/a.py", "context": ""} | dict(sample) for sample in made.samples]
    lines = [{"document": name, "n_bytes": size, "nats": each, "n_targets": size // 3} for name, size, each in rows]
    files = {
        "evaluation.json": json.dumps(figures),
        "samples.json": json.dumps(samples),
        "documents.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
    }
    return put(store, "evaluation", made, figures | {"n_samples": len(samples), "note": made.note}, files)


def documents_of(made: Made) -> list[tuple[str, int, float]]:
    """Name, bytes and nats; the k-th document is a little harder than the one before."""
    spread = [made.bits * (0.7 + 0.6 * k / max(1, made.n_documents - 1)) for k in range(made.n_documents)]
    return [(f"held/doc{k:02d}.py", 900 + 13 * k, bits * LN2 * (900 + 13 * k)) for k, bits in enumerate(spread)]


def put(
    store: Store, stage: str, made: Made, facts: dict[str, Any], files: Mapping[str, str] | None = None
) -> Artifact:
    def make(folder: Path) -> dict[str, Any]:
        for name, text in (files or {"data.bin": stage}).items():
            (folder / name).write_text(text, encoding="utf-8")
        return facts

    artifact, _ = produce(
        store, stage, code="c0de" * 4, config={"made": repr(made), "eval": made.settings.eval}, parents={}, make=make
    )
    return artifact


BUILDERS = {
    "corpus": build_corpus,
    "tokenizer": build_tokenizer,
    "shards": build_shards,
    "model": build_model,
    "baselines": build_baselines,
    "evaluation": build_evaluation,
}


# ---------------------------------------------------------------- reading a report


VOID = {"meta", "link", "br", "hr", "img", "input", "source", "path", "use", "rect", "line", "circle"}


class Reader(HTMLParser):
    """Checks that elements nest, and gathers what the tests ask for."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.sections: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.bad: list[str] = []
        self._section = "top"
        self._cells: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.elements.append((tag, found))
        if tag == "section":
            self._section = found["id"]
        if tag == "tr":
            self.tables.setdefault(self._section, []).append([])
        if tag in ("td", "th"):
            self._cells = []
        if tag == "p" and "bad" in found.get("class", "").split():
            self.bad.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"
        if tag in ("td", "th"):
            self.tables[self._section][-1].append("".join(self._cells or []))
            self._cells = None
        if tag == "section":
            self._section = "top"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.text.append(data)
        self.sections[self._section] = self.sections.get(self._section, "") + data
        if self._cells is not None:
            self._cells.append(data)
        if self.bad and "p" in self.open and self.bad[-1] == "":
            self.bad[-1] = data

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


def read_page(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == [], "elements are left open"
    return reader


def write(runs: Sequence[Run], folder: Path, is_drawn: bool = False) -> Path:
    """The report; with one blank drawing for every figure where a test is about words, since drawing takes the most time."""
    if is_drawn:
        return write_report(runs, folder)
    blank = '<svg viewBox="0 0 10 10"></svg>'
    with patch("kajiya.flows.report_results.draw_svg", lambda *_, **__: blank):
        return write_report(runs, folder)


def report_of(root: Path, *mades: Made, is_drawn: bool = False) -> tuple[Reader, str, str]:
    """The page as read, its source, and the Markdown."""
    path = write([make_run(root / "store", made) for made in mades], root / "report", is_drawn)
    return (
        read_page(path),
        path.read_text(encoding="utf-8"),
        (root / "report" / "report.md").read_text(encoding="utf-8"),
    )


def number(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reader, str, str, Path]:
    root = tmp_path_factory.mktemp("full")
    return *report_of(root, Made(), is_drawn=True), root / "report"


# ---------------------------------------------------------------- the whole report


def test_holds_every_section_in_order(full: tuple[Reader, str, str, Path]) -> None:
    reader, html, markdown, _ = full
    order = ["asked", "result", "curves", "documents", "data", "plan", "samples", "time", "cost", "derived", "config", "lineage",
             "environment", "attempts", "checks"]  # fmt: skip
    assert [found["id"] for tag, found in reader.elements if tag == "section"] == order
    assert html.startswith("<!doctype html>")
    titles = re.findall(r"^## (.*)$", markdown, flags=re.MULTILINE)
    assert len(titles) == len(order)


def test_is_self_contained(full: tuple[Reader, str, str, Path]) -> None:
    reader, html, _, _folder = full
    assert len(html) > 20_000
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    for tag, found in reader.elements:
        assert tag not in ("script", "link", "iframe", "img", "object", "base")
        for name in ("href", "src", "srcset"):
            assert found.get(name, "#").startswith("#"), (tag, found)
    ids = [found["id"] for _, found in reader.elements if "id" in found]
    assert len(ids) == len(set(ids)), "an id stands twice"
    targets = {found["href"][1:] for _, found in reader.elements if "href" in found}
    targets |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert targets <= set(ids), "a link or a clip path leads nowhere"


def test_figures_take_their_colours_from_the_page(full: tuple[Reader, str, str, Path]) -> None:
    _reader, html, markdown, folder = full
    svgs = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(svgs) == 8  # four figures, wide and narrow
    for svg in svgs:
        assert "var(--" in svg
        assert not re.search(r"#[0-9a-fA-F]{6}\b", svg), "a colour that does not follow light and dark"
        assert "<text" in svg, "text must stay text"
    linked = re.findall(r'(?:srcset|src)="([^"]+)"', markdown)
    assert len(linked) == 8
    for name in linked:
        svg = (folder / name).read_text()
        palette = figure_files.DARK if name.endswith("-dark.svg") else figure_files.LIGHT
        assert 'xmlns="http://www.w3.org/2000/svg"' in svg
        assert "var(" not in svg
        assert palette["ink"] in svg


def test_result_table_is_exact(full: tuple[Reader, str, str, Path]) -> None:
    reader, _, markdown, _ = full
    rows = documents_of(Made())
    bits = sum(row[2] for row in rows) / LN2 / sum(row[1] for row in rows)
    n_bytes = f"{sum(row[1] for row in rows):,}"
    header, model, xz, primed = reader.tables["result"]
    assert header[1:4] == ["bits per byte", "95 % interval", "model ÷ this"]
    assert model[1:] == [f"{bits:.3f}", f"{bits - 0.04:.3f} – {bits + 0.05:.3f}", "1.000", "31.25", n_bytes, "20"]
    assert xz == ["xz -9 alone", "1.684", "—", f"{bits / 1.684:.3f}", "—", n_bytes, "—"]
    assert primed[1:4] == ["1.302", "—", f"{bits / 1.302:.3f}"]
    assert f"needs {bits:.3f} bits for a byte of held-out text" in reader.words
    assert f"{1 - bits / 1.684:.0%} fewer than xz -9 alone (1.684)" in reader.words
    assert f"**{bits:.3f}**" in markdown


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (1.0, "fewer than xz -9 primed with the training text (1.302)"),
        (1.28, "no difference shown from xz -9 primed with the training text (1.302, within the interval)"),
        (2.0, "more than xz -9 primed with the training text (1.302)"),
    ],
)
def test_verdict_says_no_more_than_the_interval(tmp_path: Path, bits: float, words: str) -> None:
    reader, _, _ = report_of(tmp_path, Made(bits=bits, n_documents=6))
    assert words in reader.words


def test_one_document_gives_no_interval(tmp_path: Path) -> None:
    reader, _, _markdown = report_of(tmp_path, Made(n_documents=1))
    assert reader.tables["result"][1][2] == "none: one document"
    assert "% interval " not in reader.words.partition("Result")[0]


def test_ledger_adds_up(full: tuple[Reader, str, str, Path]) -> None:
    reader, _, markdown, _ = full
    rows = reader.tables["data"][1:7]
    assert [row[0] for row in rows] == [
        "entered", "to train on", "held out", "empty: nothing in it", "contaminated: near-duplicate of a held-out document",
        "accounted for",
    ]  # fmt: skip
    for column in (1, 2):
        entered, *parts, total = (number(row[column]) for row in rows)
        assert entered == sum(parts) == total > 0
    assert "It adds up" in reader.words
    for row in rows:
        for cell in row[1:]:
            assert cell in markdown


def test_ledger_that_does_not_add_up_is_said_in_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_two(store: Store, made: Made) -> Artifact:
        facts = corpus_facts(made)
        entered = facts["ledger"]["entered"]
        entered |= {"documents": entered["documents"] + 2, "bytes": entered["bytes"] + 30}
        return put(store, "corpus", made, facts)

    monkeypatch.setitem(BUILDERS, "corpus", lose_two)
    made = Made(n_documents=2)
    entered = corpus_facts(made)["ledger"]["entered"]
    reader, _, _ = report_of(tmp_path, made)
    assert reader.bad == [
        f"The ledger does not add up: {entered[unit] + more:,} {noun} entered, but {entered[unit]:,} accounted for."
        for unit, noun, more in (("documents", "rows", 2), ("bytes", "bytes", 30))
    ]


def test_what_is_lost_is_said_and_red_past_the_limit(tmp_path: Path) -> None:
    reader, _, _ = report_of(tmp_path / "few", Made(n_documents=2, dropped={"unreadable": 1}))
    assert "Lost: 1 of 403 rows (0.25%)" in reader.words
    assert reader.bad == []
    reader, _, _ = report_of(tmp_path / "many", Made(n_documents=2, dropped={"unreadable": 50}))
    assert len(reader.bad) == 1
    assert reader.bad[0].startswith("Lost: 50 of 452 rows (11.06%)")


def test_markdown_says_what_the_page_says(full: tuple[Reader, str, str, Path]) -> None:
    reader, _, markdown, _ = full
    cells = [cell for rows in reader.tables.values() for row in rows for cell in row if re.search(r"\d", cell)]
    assert len(cells) > 100
    for cell in cells:
        assert cell in markdown.replace("\\", ""), cell


def test_command_and_recipe_repeat_the_run(tmp_path: Path) -> None:
    config = compose("stdlib-pretrain", ["train.minutes=1.5", "optim.lr=1e-3", "data.source.options.root=/some/where"])
    run = make_run(tmp_path / "store", Made(config=config, command=("kajiya", "train", "stdlib-pretrain", "a=[1, 2]")))
    reader = read_page(write([run], tmp_path / "report"))
    assert "kajiya train stdlib-pretrain 'a=[1, 2]'" in reader.sections["asked"]
    assert compose(str(tmp_path / "report" / "recipe.yaml")) == config


def test_secrets_stay_out(tmp_path: Path) -> None:
    config = Config(name="tiny", serve=ServeConfig(api_key="s3cret"))
    command = ("kajiya", "demo", "serve.api_key=s3cret", "--api-key", "s3cret", "track.uri=http://me:s3cret@host")
    report_of(tmp_path, Made(config=config, command=command))
    files = [path for path in (tmp_path / "report").rglob("*") if path.is_file()]
    assert len(files) == 11
    for path in files:
        assert "s3cret" not in path.read_text()
    assert "serve.api_key" in read_page(tmp_path / "report" / "report.html").sections["asked"]


def test_samples_are_escaped(tmp_path: Path) -> None:
    evil = "</pre></script><script>alert(1)</script>\x00\x1b[31m```\n| a | b |\n&lt;"
    sample = {"name": "g<i>", "document": "a`|b.py", "prompt": evil, "body": evil, "completion": evil}
    reader, html, markdown = report_of(
        tmp_path, Made(samples=(sample,), name="<b>run</b>", command=("x", "<img src=y>"))
    )
    assert not [tag for tag, _ in reader.elements if tag in ("script", "i", "b", "img")]
    assert "\x00" not in html + markdown
    assert "\x1b" not in html + markdown
    shown = evil.replace("\x00", "␀").replace("\x1b", "␛")
    assert reader.sections["samples"].count(shown) == 3
    assert markdown.count(f"````\n{shown}\n````") == 3
    outside = re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "alert" not in outside
    assert "<b>" not in outside
    assert reader.words.startswith("<b>run</b> · Kajiya report")


def test_writes_beside_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("keep")
    run = make_run(tmp_path / "store", Made(n_documents=2))
    first = write([run], folder, is_drawn=True).read_text()
    second = write([run], folder, is_drawn=True).read_text()
    assert (folder / "notes.txt").read_text() == "keep"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["figures", "notes.txt", "recipe.yaml", "report.html", "report.md"]
    cut = re.compile(r"Written by Kajiya on [\d: -]+UTC")
    assert cut.sub("", first) == cut.sub("", second), "the same run gives the same report"


# ---------------------------------------------------------------- curves


def test_resumed_run_drops_superseded_points(tmp_path: Path) -> None:
    lost = [
        ("started", {"attempt": 1, "resumed_from": None}),
        ("metrics", {"step": 10, "values": {"train/nll": 99.0}}),
        ("metrics", {"step": 20, "values": {"train/nll": 98.0, "eval/nll": 97.0}}),
        ("started", {"attempt": 2, "resumed_from": 10}),
        ("metrics", {"step": 20, "values": {"train/nll": 5.5, "eval/nll": 5.0}}),
    ]
    made = Made(stages=("plan",), status="interrupted", events=lost)
    run = make_run(tmp_path / "store", made)
    history = read_history(run.folder)
    assert history.curves == {"train/nll": [(10, 99.0), (20, 5.5)], "eval/nll": [(20, 5.0)]}
    assert history.superseded == 2
    assert [(attempt.trained, attempt.resumed_from) for attempt in history.attempts] == [(True, None), (True, 10)]
    reader = read_page(write([run], tmp_path / "report"))
    assert "98" not in reader.sections["curves"]
    assert "2 points that a resumed attempt did again are left out." in reader.sections["curves"]
    assert "the checkpoint of step 10" in reader.sections["attempts"]
    assert "killed, or a power cut" in reader.sections["attempts"]


def test_begun_again_without_a_checkpoint_drops_all(tmp_path: Path) -> None:
    lost = [("started", {"attempt": 1, "resumed_from": None}), ("metrics", {"step": 5, "values": {"eval/nll": 9.0}})]
    run = make_run(tmp_path, Made(steps=20, events=lost))
    history = read_history(run.folder)
    assert [step for step, _ in history.curves["eval/nll"]] == [20]
    assert history.superseded == 1


def test_points_that_are_not_finite_are_counted_in_red(tmp_path: Path) -> None:
    events = [
        ("metrics", {"step": 5, "values": {"train/nll": math.nan}}),
        ("metrics", {"step": 6, "values": {"train/nll": 3.0}}),
    ]
    reader, _, _ = report_of(tmp_path, Made(stages=("plan",), status="failed", events=events))
    assert reader.bad == ["1 points of train/nll were NaN or infinite and are not drawn."]


def test_own_loss_is_drawn_under_its_own_name(tmp_path: Path) -> None:
    events = [("metrics", {"step": step, "values": {"train/contrast": 1 / step}}) for step in (1, 2, 4)]
    reader, _, _ = report_of(tmp_path, Made(stages=("plan",), status="interrupted", events=events))
    assert reader.tables["curves"][1][:3] == ["training rows (train/contrast)", "1.000", "1"]


# ---------------------------------------------------------------- what is missing


MISSING = {
    "nothing but a manifest": (
        Made(stages=(), status="failed", command=()),
        {
            "asked": "Started from Python",
            "result": "No evaluation: the run failed",
            "curves": "No curve",
            "documents": "No scores by document",
            "data": "No ledger",
            "plan": "No plan: the run failed",
            "samples": "No samples: the run failed",
            "time": "No times",
            "derived": "nothing derived",
            "lineage": "Not there: corpus, tokenizer, shards, model, baselines, evaluation",
        },
    ),
    "interrupted while training": (
        Made(stages=("corpus", "tokenizer", "shards", "plan", "train"), status="interrupted", steps=40),
        {
            "top": "no verdict, the run was interrupted at step 40 of 100; the same command goes on from there.",
            "result": "No evaluation: the run was interrupted at step 40 of 100",
            "plan": "Measured figures are those of the last logged step",
            "lineage": "Not there: model, baselines, evaluation",
        },
    ),
    "a model from the store": (
        Made(stages=("corpus", "tokenizer", "shards", "model", "baselines", "evaluation")),
        {"plan": "No plan: the model was found in the store", "curves": "No curve: the event log holds no loss"},
    ),
    "no baselines asked": (
        Made(stages=("corpus", "shards", "model", "evaluation"), config=Config(name="tiny", eval=EvalConfig(baselines=()))),
        {"top": "no baseline was measured beside it", "result": "No baselines: eval.baselines is empty",
         "data": "Nothing to say of the tokenizer"},
    ),
    "an own module": (
        Made(samples=(), note="no samples: the engine serves models that Transformers can load, and this is the user's own"),
        {"samples": "No samples: the engine serves models that Transformers can load, and this is the user's own."},
    ),
    "no samples asked": (
        Made(samples=(), config=Config(name="tiny", eval=EvalConfig(samples=0))),
        {"samples": "No samples: eval.samples is 0."},
    ),
    "no functions": (Made(samples=()), {"samples": "no held-out document has a Python function with a docstring"}),
    "few documents": (Made(n_documents=3), {"documents": "Fewer than 8 held-out documents"}),
}  # fmt: skip


def test_how_it_was_scored_is_said_by_the_evaluation_and_not_by_a_later_config(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "store", Made(name=name, config=Config(name=name, eval=EvalConfig(stride_fraction=stride))))
        for name, stride in (("first", 0.5), ("second", 1.0))
    ]
    for run in runs:
        config = run.manifest()["config"]
        run.record(config=config | {"eval": config["eval"] | {"stride_fraction": 0.25}})
    text = write_report(runs, tmp_path / "out").with_name("report.md").read_text()
    assert "These models were not scored in the same way." in text
    assert "the last 50% count" in text
    assert "the last 100% count" in text


@pytest.mark.parametrize("case", MISSING)
def test_says_what_is_missing(tmp_path: Path, case: str) -> None:
    made, said = MISSING[case]
    reader, _, _markdown = report_of(tmp_path, made)
    for section, words in said.items():
        assert words in " ".join(reader.sections[section].split()), section
    assert len(reader.sections) >= 15, "every section is there, whatever is missing"
    assert "problems" not in reader.sections


def test_unreadable_parts_are_problems(tmp_path: Path) -> None:
    run = make_run(tmp_path / "store", Made(n_documents=3))
    listed = run.manifest()["artifacts"]
    evaluation = run.store.root / listed["evaluation"]["path"]
    (evaluation / "samples.json").write_text("[]")
    (evaluation / "documents.jsonl").unlink()
    corpus = next(each for each in run.store.artifacts() if each.stage == "corpus")
    remove_artifact(corpus)
    reader = read_page(write([run], tmp_path / "report"))
    problems = reader.sections["problems"]
    assert "its content is not what the manifest's hash says" in problems
    assert "listed in the manifest, but missing" in problems
    assert "its folder is gone from the store" in problems
    assert "No ledger: its corpus cannot be read (see Problems)." in reader.sections["data"]
    assert "No samples: samples.json cannot be read (see Problems)." in reader.sections["samples"]
    assert "cannot be read" in reader.sections["lineage"]
    assert len(reader.tables["result"]) == 4, "the figures that can be read are there"


def test_artifact_made_anew_is_not_passed_off_as_this_run_s(tmp_path: Path) -> None:
    run = make_run(tmp_path / "store", Made(n_documents=3))
    path = run.store.root / run.manifest()["artifacts"]["evaluation"]["path"] / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"digest": "0" * 64}))
    reader = read_page(write([run], tmp_path / "report"))
    assert "made anew since this run" in reader.sections["problems"]
    assert "no verdict" in reader.sections["top"]


def test_broken_event_log_is_a_problem(tmp_path: Path) -> None:
    run = make_run(tmp_path / "store", Made(n_documents=3))
    run.events.path.write_bytes(b"not json\n")
    reader = read_page(write([run], tmp_path / "report"))
    assert "broken line at byte 0" in reader.sections["problems"]
    assert "No curve" in reader.sections["curves"]
    assert "The event log tells of no attempt." in reader.sections["attempts"]


def test_skipped_checks_and_warnings_stand_out(tmp_path: Path) -> None:
    config = replace(Config(name="tiny"), preflight=PreflightConfig(skip=("masks",)))
    events = [("warning", {"text": "mlflow is behind"}), ("warning", {"text": "mlflow is behind"})]
    reader, _, markdown = report_of(tmp_path, Made(n_documents=2, config=config, events=events))
    assert len(reader.bad) == 2  # at the top and in its section
    assert all("The check 'masks' was skipped" in words for words in reader.bad)
    assert "mlflow is behind (2 times)" in reader.sections["checks"]
    assert "**Attention:** The check 'masks' was skipped" in markdown


def test_running_and_killed_runs_are_told_apart(tmp_path: Path) -> None:
    run = make_run(tmp_path / "store", Made(stages=("plan",), status="running"))
    assert "the run is still going on" in read_page(write([run], tmp_path / "report")).sections["top"]
    run.record(owner=run.manifest()["owner"] | {"begun": 1})
    assert "the run was interrupted" in read_page(write([run], tmp_path / "report")).sections["top"]


# ---------------------------------------------------------------- several runs


def test_two_runs_share_one_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Made(bits=1.2)
    monkeypatch.setitem(BUILDERS, "corpus", lambda store, _made: build_corpus(store, first))
    reader, html, _markdown = report_of(tmp_path, first, Made(bits=1.5, seed=1, steps=60), is_drawn=True)
    header, a, b, _xz, _primed = reader.tables["result"]
    assert header[3:5] == ["A ÷ this", "B ÷ this"]
    assert [a[0][:4], b[0][:4]] == ["A · ", "B · "]
    assert [a[3], b[4]] == ["1.000", "1.000"]
    assert float(b[3]) == pytest.approx(1.2 / 1.5, abs=0.01)
    assert [row[0] for row in reader.tables["curves"][1:]] == ["A", "A", "B", "B"]
    legend = re.search(r'id="figure-curves".*?</svg>', html, flags=re.DOTALL)
    assert legend is not None
    for words in ("A: training", "A: held out", "B: training", "B: held out"):
        assert words in legend[0]
    assert ["seed", "0", "1"] in reader.tables["config"]
    assert "Model A needs" in reader.words
    assert "Model B needs" in reader.words
    assert (tmp_path / "report" / "recipe-A.yaml").is_file()
    assert (tmp_path / "report" / "recipe-B.yaml").is_file()
    assert reader.sections["samples"].count("what really follows") == 1, "the same prompt stands once"
    assert "B wrote" in reader.sections["samples"]


def test_models_that_were_scored_differently_are_not_paired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_bf16(store: Store, made: Made) -> Artifact:
        monkeypatch.setitem(FINGERPRINT, "dtype", ("bfloat16", "float32")[made.seed])
        return build_evaluation(store, made)

    monkeypatch.setitem(BUILDERS, "corpus", lambda store, _made: build_corpus(store, Made()))
    monkeypatch.setitem(BUILDERS, "evaluation", in_bf16)
    reader, _, _ = report_of(tmp_path, Made(), Made(seed=1))
    assert "A and B are not compared: they were scored differently (dtype)." in reader.words


def test_runs_on_different_texts_are_not_put_in_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_text(store: Store, made: Made) -> Artifact:
        return put(store, "corpus", made, corpus_facts(made), {"data.bin": made.name})

    monkeypatch.setitem(BUILDERS, "corpus", other_text)
    reader, _, _ = report_of(tmp_path, Made(name="one"), Made(name="two"))
    headers = [row for row in reader.tables["result"] if row[1:2] == ["bits per byte"]]
    assert [header[3:4] for header in headers] == [["A ÷ this"], ["B ÷ this"]]
    assert "Figures of different tables cannot be compared." in reader.sections["result"]


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("pdftotext")),
    reason="no chromium or pdftotext here (apt-get install chromium poppler-utils)",
)
def test_the_printed_report_is_short_and_has_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Made(bits=1.2)
    monkeypatch.setitem(BUILDERS, "corpus", lambda store, _made: build_corpus(store, first))
    runs = [make_run(tmp_path / "store", made) for made in (first, Made(bits=1.5, seed=1, steps=60))]
    page = write_report(runs, tmp_path / "report")
    pdf = tmp_path / "report.pdf"
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-pdf-header-footer",
             f"--user-data-dir={tmp_path / 'chromium'}", f"--print-to-pdf={pdf}")  # fmt: skip
    subprocess.run(["chromium", *flags, page.as_uri()], check=True, capture_output=True, timeout=300)
    text = subprocess.run(["pdftotext", "-layout", pdf, "-"], check=True, capture_output=True, text=True).stdout
    assert 3 <= text.count("\f") <= 12
    # Letters of the figures themselves, drawn as text, stand on the paper.
    for words in (
        "training tokens",
        "A: held out",
        "xz -9 primed with the training text",
        "Paired comparison",
        "Environment",
    ):
        assert words in text, words


# ---------------------------------------------------------------- files and packages


def test_figure_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "store", Made(n_documents=2))
    names = [path.name for path in save_figure_files(run, tmp_path / "figures")]
    assert names == ["curves.png", "curves-dark.png", "bits-per-byte.png", "bits-per-byte-dark.png"]
    for name in names:
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")
    bare = make_run(tmp_path / "store", Made(stages=(), status="failed", seed=9))
    assert save_figure_files(bare, tmp_path / "none") == []


def test_missing_packages_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "store", Made(n_documents=2))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'matplotlib'.\n.*kajiya\[report\]"):
        write_report([run], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_failed_run_names_its_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "store", Made(stages=("plan",), status="failed"))
    run.events.emit("opened", pid=1)
    run.events.emit("ended", status="failed", error="OSError: the disk is full")
    reader = read_page(write([run], tmp_path / "report"))
    assert "no verdict, the run failed (OSError: the disk is full)." in reader.sections["top"]
    assert "failed: OSError: the disk is full" in reader.sections["attempts"]


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="at least one run"):
        write_report([], tmp_path)


def test_a_store_of_before_the_ledger_is_told_and_the_rest_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def old_facts(made: Made) -> dict[str, Any]:
        facts = corpus_facts(made)
        facts["ledger"] = {"entered": facts["ledger"]["entered"], "kept": facts["ledger"]["train"]}
        return facts

    monkeypatch.setitem(BUILDERS, "corpus", lambda store, made: put(store, "corpus", made, old_facts(made)))
    reader = read_page(write_report([make_run(tmp_path, Made())], tmp_path / "report"))
    assert "a manifest has no field 'train'; it was made by another version" in " ".join(
        reader.sections["data"].split()
    )
    assert "bits per byte" in reader.sections["result"]


def test_runs_that_differ_by_their_seed_alone_tell_the_noise(tmp_path: Path) -> None:
    bits = {0: 2.00, 1: 2.02, 2: 2.04}
    runs = [make_run(tmp_path, Made(seed=seed, bits=each)) for seed, each in bits.items()]
    words = " ".join(read_page(write_report(runs, tmp_path / "report")).sections["comparison"].split())
    figures = [
        read_json(run.store.root / run.manifest()["artifacts"]["evaluation"]["path"] / "evaluation.json")
        for run in runs
    ]
    spread = statistics.stdev(each["bits_per_byte"] for each in figures)
    assert f"A, B, C differ by their seed alone: {statistics.mean(e['bits_per_byte'] for e in figures):.4f}" in words
    assert f"standard deviation {spread:.2g}" in words


def test_the_noise_of_seeds_is_told_of_every_judged_figure(tmp_path: Path) -> None:
    def figure(value: float, *, is_judged: bool = True) -> dict[str, Any]:
        return {
            "value": value, "interval": None, "is_lower_better": False, "is_judged": is_judged, "is_mean": True,
            "points": 100, "signature": "", "details": {}, "n": 9,
        }  # fmt: skip

    runs = []
    for seed, lr in ((0, 1e-3), (1, 1e-3), (2, 1e-3), (0, 2e-3), (1, 2e-3)):
        config = Config(name="tiny", seed=seed, optim=OptimConfig(lr=lr))
        stages = ("corpus", "tokenizer", "shards", "plan", "train", "model")
        made = Made(seed=seed, stages=stages, config=config, steps=100 + round(1e4 * lr))
        run = make_run(tmp_path, made)
        about = {"n_rows": 9, "n_groups": 9, "fingerprint": FINGERPRINT}
        accuracy = 0.5 + 0.01 * seed + (0.2 if lr > 1e-3 else 0)
        own = {"accuracy": figure(accuracy), "margin": figure(7.0 + seed, is_judged=False)}
        run.record_artifact(
            "evaluation", put(run.store, "evaluation", made, about | {"task": "held-out rows", "figures": own})
        )
        task = about | {"task": "mine", "figures": {"f1": figure(accuracy / 2)}}
        run.record_artifact("task mine", put(run.store, "task", made, task))
        runs.append(run)
    report = read_page(write_report(runs, tmp_path / "report"))
    words = " ".join(report.sections["comparison"].split())
    assert "A, B, C differ by their seed alone: 0.5100 accuracy, standard deviation 0.01." in words
    assert "On accuracy, the settings of A, B, C and of D, E differ by more than seeds do (+0.195" in words
    assert "On mine: f1, the settings of A, B, C and of D, E differ by more than seeds do (+0.0975" in words
    noise = statistics.stdev([0.5, 0.51, 0.52]) * stats.t.ppf(0.975, 4) * math.sqrt(2 / 3)
    assert ["accuracy", "0.51", "0.01", f"{noise:.2g}"] in report.tables["comparison"]
    assert not [row for row in report.tables["comparison"] if row[0] == "margin"]


def test_tasks_along_the_training_are_drawn_with_tips(tmp_path: Path) -> None:
    run = make_run(tmp_path, Made())
    for step in (20, 40):
        run.events.emit("metrics", step=step, values={"task/mine/accuracy": step / 100})
    report = write_report([run], tmp_path / "report")
    html = report.read_text(encoding="utf-8")
    assert "<title>model: task/mine/accuracy 0.2 after 20 optimizer steps</title>" in html
    assert "held out" in "".join(re.findall(r"<title>(.*?)</title>", html))
    assert "tip-" not in html
