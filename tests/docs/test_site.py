"""The other pages: they say what is so, and the site builds without anything from outside."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.docs import pages

import kajiya
from kajiya.config.compose import compose
from kajiya.config.schema import ServeConfig
from kajiya.data.tokenizer import load_tokenizer
from kajiya.run.events import read_events

ROOT = pages.DOCS.parent


def first_column(page: str, header: str) -> list[str]:
    """The names in backticks of the first column of the table that begins with `header`."""
    text = (pages.DOCS / page).read_text(encoding="utf-8")
    rows = text.partition(f"\n| {header} |")[2].partition("\n\n")[0].splitlines()[2:]
    assert rows, f"{page} has no table that begins with {header}"
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def test_the_reference_is_current() -> None:
    script = pages.DOCS / "make_reference.py"
    spec = importlib.util.spec_from_file_location("make_reference", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    current = (pages.DOCS / "reference.md").read_text(encoding="utf-8")
    assert module.page() == current, "run: python docs/make_reference.py"


def test_the_reference_names_every_setting() -> None:
    from kajiya.config.compose import option_paths

    text = (pages.DOCS / "reference.md").read_text(encoding="utf-8")
    missing = [path for path in option_paths() if f"| `{path}` |" not in text]
    assert missing == []


@pytest.mark.parametrize("page", sorted(path.name for path in pages.DOCS.glob("*.md")))
def test_every_command_on_a_page_exists(page: str) -> None:
    import typer

    from kajiya.cli import app

    known: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    commands = [
        line.removeprefix("$ ").split()
        for block in pages.blocks(pages.DOCS / page)
        if block.language == "console"
        for line in block.body.splitlines()
        if line.startswith("$ kajiya ")
    ]
    for _, verb, *words in commands:
        assert verb in known, verb
        below = vars(known[verb]).get("commands")
        assert below is None or words[0] in below, words


def test_the_functions_of_the_first_page_exist() -> None:
    (block,) = [block for block in pages.blocks(pages.DOCS / "index.md") if block.language == "python"]
    used = {node.attr for node in ast.walk(ast.parse(block.body)) if isinstance(node, ast.Attribute)}
    assert used == {"compose", "train", "load"}
    for name in used:
        assert callable(getattr(kajiya, name))
    assert kajiya.compose("stdlib-pretrain", ["train.minutes=10"]).train.minutes == 10


_TELLERS = {"emit", "hear", "hear_early", "on_event", "tell"}
_SCREEN_ONLY = {"progress", "run", "member"}
"""Kinds of events that are told and not logged."""


def _told() -> dict[str, list[set[str] | None]]:
    """Every kind of event that the sources tell by name, with the fields of each call; `None` for some that are computed."""
    found: dict[str, list[set[str] | None]] = {}
    for path in sorted((ROOT / "src" / "kajiya").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not (isinstance(node, ast.Call) and node.args and node.keywords):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else vars(node.func).get("id")
            first = node.args[0]
            if called in _TELLERS and isinstance(first, ast.Constant) and isinstance(first.value, str):
                names = {word.arg for word in node.keywords}
                found.setdefault(first.value, []).append(None if None in names else {str(name) for name in names})
    return found


def test_every_kind_of_event_is_on_the_page(finished: Any) -> None:
    named = first_column("artifacts.md", "Kind")
    text = (pages.DOCS / "artifacts.md").read_text(encoding="utf-8").partition("### The event log")[2]
    rows = {kind: re.findall(rf"^\| `{kind}` \| (.*?) \|", text, re.M) for kind in named}
    fields = {kind: set(re.findall(r"`(\w+)`", row)) for kind, (row,) in rows.items()}
    told = _told()
    assert told.keys() - _SCREEN_ONLY == set(named)
    for kind in named:
        assert [each for each in told[kind] if each is not None and each != fields[kind]] == [], kind
    logged = {event["kind"]: event.keys() - {"t", "kind"} for event in read_events(finished.trained.run.folder)}
    assert {kind: fields[kind] for kind in logged} == logged
    module = (ROOT / "src" / "kajiya" / "run" / "events.py").read_text(encoding="utf-8")
    assert set(re.findall(r"^- `(\w+)`: ", module, re.M)) == set(named)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_table_of_verbs_names_every_command(page: str) -> None:
    import typer

    from kajiya.cli import app

    commands: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    known = {name: set(vars(each).get("commands") or ()) for name, each in commands.items()}
    named: dict[str, set[str]] = {}
    for cell in re.findall(r"^\| (`kajiya .*?) \| ", (ROOT / page).read_text(encoding="utf-8"), re.M):
        first, *others = re.findall(r"`([^`]+)`", cell)
        verb, *words = first.removeprefix("kajiya ").split()
        if known[verb]:
            named[verb] = {*words[0].split("\\|"), *others}
        else:
            named |= {each.split()[0]: set() for each in (verb, *others)}
    assert named == known


def test_every_field_of_a_manifest_is_on_the_page(finished: Any) -> None:
    store = finished.store.root
    manifests = [json.loads(path.read_bytes()) for path in store.glob("artifacts/*/*/manifest.json")]
    assert len(manifests) >= 6
    assert {field for manifest in manifests for field in manifest} == set(first_column("artifacts.md", "Field"))
    stages = {manifest["stage"] for manifest in manifests}
    text = (pages.DOCS / "artifacts.md").read_text(encoding="utf-8")
    assert all(re.search(rf"\b{stage}/", text) for stage in stages)


def test_every_file_of_a_checkpoint_is_on_the_page(finished: Any) -> None:
    folders = list(finished.trained.run.checkpoints.iterdir())
    assert folders
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == set(first_column("artifacts.md", "File"))


def test_the_tracked_recipe_composes(tmp_path: Path) -> None:
    (block,) = [block for block in pages.blocks(pages.DOCS / "artifacts.md") if block.title == "tracked.yaml"]
    (tmp_path / block.title).write_text(block.body, encoding="utf-8")
    assert compose(str(tmp_path / block.title)).track.trackers == ("mlflow", "tensorboard")


def test_the_variables_of_the_environment_that_the_package_reads_are_said() -> None:
    """Others are passed to trackers or set for the process; `doctor` looks for the compiler where torch looks for it."""
    ranks = {"'RANK'", "'LOCAL_RANK'", "'WORLD_SIZE'", "'LOCAL_WORLD_SIZE'"}
    reading: dict[str, list[str]] = {}
    for path in sorted((ROOT / "src" / "kajiya").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            is_call = isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv")
            if is_call and (variable := ast.unparse(node.args[0])) not in ranks:
                reading.setdefault(path.name, []).append(variable)
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
                assert ast.unparse(node.value) != "os.environ", f"{path}: {ast.unparse(node)}"
    # The judge's is named by the task.
    assert reading == {
        "store.py": ["STORE_VARIABLE"],
        "doctor.py": ["'CXX'"],
        "judge.py": ["judge.key_variable"],
        "process.py": ["'OMP_NUM_THREADS'"],
    }
    for page in ("README.md", "docs/artifacts.md"):
        said = (ROOT / page).read_text(encoding="utf-8")
        assert [
            name for name in ("KAJIYA_STORE", "OMP_NUM_THREADS", "CXX", "torchrun") if f"`{name}`" not in said
        ] == []
        assert "judge's key" in said


def test_every_address_and_parameter_of_the_server_is_on_the_page(finished: Any) -> None:
    from kajiya.serving.api import create_app
    from kajiya.serving.loading import load_engine
    from kajiya.serving.protocol import ChatBody, CompletionBody, EmbeddingBody

    folder = finished.trained.model.path
    engine = load_engine(folder, precision="fp32", device="cpu", max_batch=1, max_waiting=1)
    app = create_app(engine, load_tokenizer(folder), "model", ServeConfig())
    real = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}
    named = {tuple(address.split()) for address in first_column("serving.md", "Address")}
    assert real == named
    text = (pages.DOCS / "serving.md").read_text(encoding="utf-8")
    parameters = text.partition("## What a request may say")[2].partition("## Errors")[0]
    for body in (ChatBody, CompletionBody, EmbeddingBody):
        for field in body.model_fields:
            assert f"`{field}`" in parameters, field


def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs-material is not installed (pip install 'kajiya[docs]')")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = sorted((tmp_path / "site").glob("*.html"))
    assert len(built) >= 6
    for page in built:
        html = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)="(https?:)?//[^"]*"', html)
        assert fetched == [], page
    assert not list((tmp_path / "site").glob("*.py"))
