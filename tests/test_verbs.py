"""Every verb of the command line is run by a test on a tiny model; the ones that no other file runs are run here."""

import ast
import itertools
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.conftest import Finished, small_overrides
from tests.flows.test_merge import make_adapter
from tests.test_cli import kajiya
from typer.testing import CliRunner

from kajiya.cli import app

TESTS = Path(__file__).parent
RUN_BY = {
    "demo": "test_cli.py::test_demo_without_serving",
    "train": "test_cli.py::test_diff_of_two_runs",
    "train --multirun": "test_verbs.py::test_multirun",
    "train --find-lr": "test_verbs.py::test_find_lr",
    "tune": "flows/test_tune.py::test_a_killed_search_goes_on_and_a_crash_is_counted",
    "plan": "test_cli.py::test_plan_prints_figures_and_trains_nothing",
    "prove": "test_verbs.py::test_prove",
    "preview": "flows/test_preview.py::test_the_verb",
    "eval": "test_cli.py::test_eval_of_a_run_and_of_a_folder",
    "report": "test_cli.py::test_runs_show_and_report",
    "shift": "flows/test_shift.py::test_runs_and_their_embeddings",
    "serve": "test_cli.py::test_serve_answers_and_stops",
    "generate": "test_verbs.py::test_generate",
    "chat": "test_verbs.py::test_chat",
    "merge": "test_verbs.py::test_merge",
    "runs": "test_cli.py::test_runs_show_and_report",
    "show": "test_cli.py::test_runs_show_and_report",
    "diff": "test_cli.py::test_diff_of_two_runs",
    "replay": "test_verbs.py::test_replay_is_bit_identical",
    "sync": "test_verbs.py::test_sync",
    "ui": "run/test_ui.py::test_the_ui_answers_with_the_stores_runs_and_ends_with_the_command",
    "doctor": "test_cli.py::test_doctor_names_what_is_missing_and_the_remedy",
    "config show": "test_cli.py::test_config_verbs",
    "config schema": "test_cli.py::test_config_verbs",
    "config list": "test_cli.py::test_config_verbs",
    "store list": "test_cli.py::test_store_verbs",
    "store verify": "test_cli.py::test_store_verbs",
    "store gc": "test_cli.py::test_store_verbs",
    "store pin": "test_cli.py::test_store_verbs",
}
"""Which test runs which verb."""


def commands(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All commands at and below one with their words, those of a group as `store list`."""
    below = vars(command).get("commands")
    if below is None:
        yield path, command
        return
    for name, inner in below.items():
        yield from commands(inner, f"{path} {name}".strip())


VERBS = dict(commands(typer.main.get_command(app)))


def _typed(path: Path) -> set[str]:
    """All words that stand one behind the other in a call, a list or a tuple of the file, two by two and alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        given = node.args if isinstance(node, ast.Call) else node.elts if isinstance(node, ast.List | ast.Tuple) else []
        words = [each.value if isinstance(each, ast.Constant) else None for each in given]
        found |= {str(word) for word in words} | {f"{a} {b}" for a, b in itertools.pairwise(words)}
    return found


def test_every_verb_is_run_by_a_test() -> None:
    assert len(VERBS) > 20
    assert {verb.partition(" --")[0] for verb in RUN_BY} == VERBS.keys()
    for verb, where in RUN_BY.items():
        file, _, name = where.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, where
        assert verb.partition(" --")[0] in _typed(TESTS / file), f"{file} does not type {verb!r}"


def test_help_names_every_verb() -> None:
    assert "Usage" in kajiya("--help")
    groups: dict[str, list[str]] = {"": []}
    for verb in VERBS:
        group, _, name = verb.rpartition(" ")
        groups.setdefault(group, []).append(name)
        assert "Usage" in kajiya(*verb.split(), "--help")
    groups[""] += [group for group in groups if group]
    for group, names in groups.items():
        text = kajiya(*group.split(), "--help")
        assert [name for name in names if f" {name} " not in text] == []


def test_every_argument_and_option_has_its_words() -> None:
    assert [f"{verb} {each.name}" for verb, command in VERBS.items() for each in command.params if not each.help] == []


def test_every_verb_that_prints_facts_prints_them_as_json() -> None:
    """Left out are those that serve or talk, and the schema, which is JSON anyway."""
    without = {verb for verb, command in VERBS.items() if "as_json" not in {each.name for each in command.params}}
    assert without == {"serve", "ui", "chat", "generate", "config schema"}


# ---------------------------------------------------------------- what no other file runs


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, as the shared run was trained with; the speed of a step is nobody's concern here."""
    monkeypatch.setattr("kajiya.run.provenance.usable_cores", lambda: 1)
    monkeypatch.setattr("kajiya.flows.planning._ENOUGH_S", {"by time": 0.0, "by steps": 0.0})


@pytest.fixture
def store(own_finished: Finished) -> str:
    return str(own_finished.store.root)


def test_prove(store: str) -> None:
    facts = json.loads(kajiya("prove", "stdlib-pretrain", *small_overrides(), "--store", store, "--json"))
    assert {finding["state"] for finding in facts["findings"]} <= {"passed", "skipped"}
    assert len(facts["findings"]) == 10


def test_find_lr(own_finished: Finished, store: str) -> None:
    text = kajiya("train", "stdlib-pretrain", *small_overrides(), "--find-lr", "--store", store)
    assert "Suggested: optim.lr=" in text
    assert (own_finished.trained.run.folder / "lr-range.png").is_file()


def test_multirun(own_finished: Finished, store: str) -> None:
    words = ["train", "stdlib-pretrain", *small_overrides(), "seed=choice(0)", "-m", "--store", store]
    text = kajiya(*words)
    assert f"seed=0: finished {own_finished.trained.run.id}" in text
    assert f"kajiya report {own_finished.trained.run.id}" in text


def test_merge(own_finished: Finished, store: str, tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    root = Path(sysconfig.get_paths()["stdlib"]) / "email"
    recipe.write_text(f"data: {{heldout_every: 5, source: {{name: stdlib, options: {{root: '{root}'}}}}}}\n")
    adapter = make_adapter(tmp_path / "adapter", own_finished.trained.model.path)
    facts = json.loads(kajiya("merge", adapter, "--data", str(recipe), "--store", store, "--json"))
    assert [each["dtype"] for each in facts["certificate"]["parity"]] == ["float32", "bfloat16"]
    assert (Path(facts["path"]) / "model.safetensors").is_file()
    text = kajiya("merge", adapter, "--data", str(recipe), "--store", store)
    assert "largest difference of a logit" in text
    assert text.rstrip().endswith(facts["path"])


def test_replay_is_bit_identical(own_finished: Finished, store: str) -> None:
    found = json.loads(kajiya("replay", own_finished.trained.run.id, "--store", store, "--json"))
    assert found["verdict"] == "bit-identical", found
    first, again = found["metrics"]["test/bits_per_byte"]
    assert first == again
    assert found["differs"].keys() <= {"environment"}


def test_sync(own_finished: Finished, store: str) -> None:
    run = own_finished.trained.run
    text = kajiya("sync", run.id, "tensorboard", "--store", store)
    assert f"events of {run.id}, " in text
    assert list((run.folder / "tensorboard").iterdir())
    assert kajiya("sync", run.id, "tensorboard", "--store", store) == text
    (facts,) = json.loads(kajiya("sync", run.id, "tensorboard", "--store", store, "--json"))
    assert text == f"{facts['tracker']}: {facts['events']:,} events of {facts['run']}, {facts['status']}\n"


def test_generate(own_finished: Finished, store: str, tmp_path: Path) -> None:
    requests = tmp_path / "in.jsonl"
    requests.write_text('{"prompt": "def f("}\n{"prompt": "import "}\n')
    model = str(own_finished.trained.model.path)
    kajiya("generate", str(requests), "--model", model, "--max-tokens", "3", "--store", store)
    answers = [json.loads(line) for line in (tmp_path / "in.answers.jsonl").read_text().splitlines()]
    assert {answer["id"] for answer in answers} == {"1", "2"}
    assert all(answer["choices"][0]["text"] for answer in answers)


def test_chat(own_finished: Finished, store: str) -> None:
    words = ["chat", str(own_finished.trained.model.path), "--max-tokens", "3", "--store", store]
    done = CliRunner().invoke(app, words, input="hello\n/reset\n/exit\n", catch_exceptions=False)
    assert done.exit_code == 0
    assert "tokens, " in done.stdout
    assert "begun anew" in done.stdout
