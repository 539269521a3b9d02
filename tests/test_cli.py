"""Verbs on a tiny model; errors in one or two lines; plain output where stdout is no terminal. `test_verbs` has the rest."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Finished, small_overrides
from typer.testing import CliRunner

from kajiya.cli import app, main
from kajiya.preflight.doctor import Finding
from kajiya.verbs.speaking import typed_command

CONTROL = re.compile(r"\x1b|\r")


def kajiya(*words: str) -> str:
    """Run a verb in this process; its output must be plain."""
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert not CONTROL.search(result.output)
    return str(result.stdout)


def kajiya_process(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a verb as a person would, in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "kajiya", *words], capture_output=True, text=True, env=environment, check=False
    )


@pytest.fixture(autouse=True)
def _one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second thread costs tiny tensors more than it brings."""
    monkeypatch.setattr("kajiya.run.provenance.usable_cores", lambda: 1)


@pytest.fixture
def store(finished: Finished) -> str:
    return str(finished.store.root)


def _json(text: str) -> Any:
    return json.loads(text)


def test_runs_show_and_report(finished: Finished, store: str, tmp_path: Path) -> None:
    run = finished.trained.run.id
    assert run in kajiya("runs", "--store", store)
    rows = _json(kajiya("runs", "--store", store, "--json"))
    assert any(row["id"] == run and row["status"] == "finished" for row in rows)
    assert "test/bits_per_byte" in kajiya("show", run, "--store", store)
    facts = _json(kajiya("show", run, "--store", store, "--json"))
    assert facts["history"]["metrics"]["test/bits_per_byte"] > 0
    said = kajiya("report", run, "--out", str(tmp_path), "--store", store, "--json")
    assert _json(said) == {"report": str(tmp_path / "report.html")}
    assert kajiya("report", run, "--out", str(tmp_path), "--store", store) == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "report.md").is_file()


def test_diff_of_two_runs(finished: Finished, store: str) -> None:
    other = CliRunner().invoke(
        app, ["train", "stdlib-pretrain", *small_overrides("seed=5", "eval.samples=0"), "--store", store, "--json"]
    )
    assert other.exit_code == 0, other.output
    second = _json(other.stdout)["id"]
    found = _json(kajiya("diff", finished.trained.run.id, second, "--store", store, "--json"))
    assert found["config"]["seed"] == [0, 5]
    assert "config: seed" in kajiya("diff", finished.trained.run.id, second, "--store", store)


def test_plan_prints_figures_and_trains_nothing(store: str, finished: Finished) -> None:
    before = len(list((finished.store.root / "runs").iterdir()))
    text = kajiya("plan", "stdlib-pretrain", *small_overrides(), "--store", store)
    for word in ("parameters", "tokens", "speed", "memory", "precision"):
        assert word in text
    assert len(list((finished.store.root / "runs").iterdir())) == before


def test_eval_of_a_run_and_of_a_folder(finished: Finished, store: str) -> None:
    by_run = _json(kajiya("eval", finished.trained.run.id, *small_overrides(), "--store", store, "--json"))
    assert by_run["bits_per_byte"] == pytest.approx(
        _json(kajiya("eval", str(finished.trained.model.path), *small_overrides(), "--store", store, "--json"))[
            "bits_per_byte"
        ]
    )
    own = _json(kajiya("eval", finished.trained.run.id, "--store", store, "--json"))
    assert own["fingerprint"] == by_run["fingerprint"], "of a run, the text that it held out"
    assert own["bits_per_byte"] == by_run["bits_per_byte"]
    text = kajiya("eval", finished.trained.run.id, "--store", store, "--show-errors", "--n-errors", "2")
    assert "✓ stdlib-pretrain: " in text, "whose text it is"
    assert "bits per byte" in text
    shown = [float(line.split()[1]) for line in text.splitlines() if line.startswith("bits_per_byte: ")]
    assert len(shown) == 2, "as many as asked for"
    assert shown[0] >= max(shown[1], by_run["bits_per_byte"]), "the hardest documents first"
    assert f"held-out text: {by_run['n_documents']} rows without full marks, 2 of them:" in text


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--limit", "3"], "--limit: is the most rows of a task, and none is asked"),
        (["--api-key", "k"], "--api-key: is for an endpoint, and 'latest' is no address of one"),
        (["--tasks", "stdlib-body", "--model-name", "m"], "--model-name: is for an endpoint"),
    ],
)
def test_eval_refuses_an_option_that_it_would_not_read(option: list[str], said: str, store: str) -> None:
    refused = kajiya_process("eval", "latest", "--store", store, *option)
    assert refused.returncode == 2
    assert said in refused.stderr


def test_eval_of_tasks_shows_the_worst_rows_by_a_metric(own_finished: Finished, tmp_path: Path) -> None:
    store = str(own_finished.store.root)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": f"def f{i}(", "a": "self"}) + "\n" for i in range(4)))
    task = {"rows": "rows.jsonl", "prompt": "{{ q }}", "target": "{{ a }}", "metrics": ["bleu", "exact_match", "f1"],
            "max_tokens": 4}  # fmt: skip
    (tmp_path / "mine.yaml").write_text(json.dumps(task))
    words = ["eval", own_finished.trained.run.id, "--tasks", str(tmp_path / "mine.yaml"), "--store", store]
    text = kajiya(*words, "--show-errors")
    assert "mine: 4 rows without full marks, 4 of them:" in text
    assert "prompt: def f0(" in text
    assert "target: self" in text
    assert "4 rows without full marks" in kajiya(*words, "--show-errors", "--metric", "f1")
    refused = kajiya_process(*words, "--show-errors", "--metric", "bleu")
    assert refused.returncode == 2
    assert "bleu says nothing of a single row" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_config_verbs(tmp_path: Path) -> None:
    recipes = _json(kajiya("config", "list", "--json"))["recipes"]
    assert "stdlib-pretrain" in recipes
    assert kajiya("config", "list").splitlines()[0] == "recipes: " + ", ".join(recipes), "a line of a pipe stays whole"
    shown = _json(kajiya("config", "show", "stdlib-pretrain", "optim.lr=0.5", "--json"))
    assert shown["optim"]["lr"] == 0.5
    assert "lr: 0.5" in kajiya("config", "show", "stdlib-pretrain", "optim.lr=0.5")
    assert _json(kajiya("config", "schema"))["properties"]["optim"]


def test_store_verbs(finished: Finished, store: str) -> None:
    model = finished.trained.run.manifest()["artifacts"]["model"]
    name = f"model/{model['key'][:24]}"
    assert name in kajiya("store", "list", "--store", store)
    assert "0 broken" in kajiya("store", "verify", "--store", store)
    assert "pinned" in kajiya("store", "pin", name, "--store", store)
    assert "no longer pinned" in kajiya("store", "pin", name, "--remove", "--store", store)
    pinned = _json(kajiya("store", "pin", name, "--store", store, "--json"))
    removed = _json(kajiya("store", "pin", name, "--remove", "--store", store, "--json"))
    assert (pinned, removed) == ({"artifact": name, "pinned": True}, {"artifact": name, "pinned": False})
    assert "would go" in kajiya("store", "gc", "--store", store)
    assert finished.trained.model.path.is_dir()


def test_in_a_pipe_every_row_is_one_line(finished: Finished, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished.trained.run
    shown = kajiya("show", run.id, "--store", store).splitlines()
    command = " ".join(run.manifest()["command"])
    assert len(command) > 160
    assert any(line.endswith(f" {command}") for line in shown)
    assert [line for line in shown if line != line.rstrip()] == []
    remedy = f"{'/a/long/folder' * 20}/python -m pip install 'kajiya[track]'"
    findings = [Finding("extra track", "missing", "without [mlflow]", remedy), Finding("gpu", "ok", "none")]
    monkeypatch.setattr("kajiya.preflight.doctor.diagnose", lambda _root: findings)
    assert kajiya("doctor").splitlines() == [
        "– extra track  without [mlflow]",
        f"               {remedy}",
        "✓ gpu          none",
    ]


def test_doctor_names_what_is_missing_and_the_remedy(store: str) -> None:
    findings = _json(kajiya("doctor", "--store", store, "--json"))
    names = {finding["name"] for finding in findings}
    assert len(names) > 10
    assert all(finding["remedy"] for finding in findings if finding["state"] == "missing")
    assert "python" in kajiya("doctor", "--store", store).lower()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("train", "stdlib-pretrain", "optim.lx=3"), "did you mean 'optim.lr'?"),
        (("train", "stdlib-pretrian"), "did you mean 'stdlib-pretrain"),
        (("show", "nothing-of-the-kind"), "is no run"),
        (("serve", "nothing-of-the-kind"), "is no run or model"),
    ],
)
def test_a_mistake_is_two_lines_and_exit_2(words: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    ended = kajiya_process(*words, *(["--store", str(tmp_path)] if words[0] != "config" else []))
    assert ended.returncode == 2
    assert expected in ended.stderr
    assert ended.stdout == ""
    assert len(ended.stderr.strip().splitlines()) <= 2
    assert "Traceback" not in ended.stderr


def test_debug_shows_the_traceback() -> None:
    ended = kajiya_process("train", "stdlib-pretrain", "optim.lx=3", "--debug")
    assert ended.returncode == 2
    assert "Traceback" in ended.stderr


def ended_by(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Exit status of the program with these words, in this process."""
    monkeypatch.setattr(sys, "argv", ["kajiya", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_broken_artifact_is_exit_1(
    own_finished: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["store", "verify", "--store", str(own_finished.store.root)]
    assert ended_by(monkeypatch, *words) == 0
    entry = own_finished.trained.run.manifest()["artifacts"]["model"]
    (own_finished.store.root / entry["path"] / "model.safetensors").write_bytes(b"not what it was")
    assert ended_by(monkeypatch, *words) == 1
    said = capsys.readouterr().out
    assert f"broken: model/{entry['key'][:24]}: " in said
    assert "1 broken" in said
    assert ended_by(monkeypatch, *words, "--json") == 1
    assert [row["name"] for row in _json(capsys.readouterr().out) if row["problem"]] == [f"model/{entry['key'][:24]}"]


def test_a_mistake_of_our_own_is_exit_1_in_two_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_root: Path) -> None:
        raise ZeroDivisionError("of our own")

    monkeypatch.setattr("kajiya.preflight.doctor.diagnose", fail)
    assert ended_by(monkeypatch, "doctor") == 1
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "internal error: ZeroDivisionError: of our own",
        "Run it again with --debug to see where.",
    ]
    assert said.out == ""
    assert ended_by(monkeypatch, "doctor", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_to_is_exit_2(
    finished: Finished, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    recipe = ["stdlib-pretrain", *small_overrides()]
    for words in (
        ["train", *recipe, "--store", str(file / "store")],
        ["plan", *recipe, "--store", str(file)],
        ["report", finished.trained.run.id, "--out", str(file), "--store", store],
        ["preview", *recipe, "--html", str(tmp_path), "--store", store],
    ):
        assert ended_by(monkeypatch, *words) == 2, words
        said = capsys.readouterr().err.partition("error: ")[2].splitlines()
        assert said[0].startswith(str(tmp_path))
        assert said[1] == "Mend the place, or name another one with --store, or with --out, --output or --html."
        assert len(said) == 2


@pytest.mark.parametrize("top_p", ["2", "-0.1"])
def test_a_chat_from_a_mass_that_is_none_is_refused_before_a_model_is_loaded(top_p: str) -> None:
    ended = CliRunner().invoke(app, ["chat", "nothing-of-the-kind", "--top-p", top_p])
    assert ended.exit_code == 2
    assert "--top-p" in ended.output


def test_an_unknown_verb_is_exit_2() -> None:
    assert kajiya_process("trian").returncode == 2


def test_demo_config_follows_the_minutes() -> None:
    from kajiya.flows.demo import demo_config

    short, long = demo_config(4, []), demo_config(30, ["seed=3"])
    assert short.train.minutes is not None
    assert long.train.minutes is not None
    assert 2 < short.train.minutes < 4
    assert 25 < long.train.minutes < 30
    assert (short.name, long.name, long.seed) == ("stdlib-pretrain", "stdlib-pretrain-long", 3)


def test_demo_without_serving(tmp_path: Path) -> None:
    words = ["demo", "--no-serve", *small_overrides(), "--store", str(tmp_path)]
    text = kajiya(*words)
    for word in ("Training the tokenizer", "held out", "parameters", "bits per byte", "report.html"):
        assert word in text
    assert "unchanged, reused" not in text
    again = kajiya(*words)
    begun = ("Reading", "Training the tokenizer", "Tokenizing", "Training …", "Measuring", "Evaluating")
    for stage in begun:
        ending = again[again.index(stage) :].splitlines()[1]
        assert ending.endswith("unchanged, reused"), ending
    assert again.splitlines()[-3:] == text.splitlines()[-3:], "the run, the model, the report"
    assert _json(kajiya(*words, "--json"))["id"] in text


def test_a_busy_port_is_said_before_the_demo_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["demo", *small_overrides(), f"serve.port={port}", "--store", str(tmp_path / "store")]
        assert ended_by(monkeypatch, *words) == 2
    assert f"serve.port: {port} on 127.0.0.1 is in use" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("on_path", "started_as", "typed"),
    [
        ("/usr/bin/kajiya", "/usr/bin/kajiya", ["kajiya"]),
        (None, ".venv/bin/kajiya", [".venv/bin/kajiya"]),
        (None, "/src/kajiya/__main__.py", [sys.executable, "-m", "kajiya"]),
    ],
)
def test_the_command_that_goes_on_can_be_typed(
    on_path: str | None, started_as: str, typed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `make demo` the program is not on the PATH."""
    monkeypatch.setattr(shutil, "which", lambda name: on_path)
    monkeypatch.setattr(sys, "argv", [started_as, "demo", "--no-serve"])
    assert typed_command() == [*typed, "demo", "--no-serve"]


def test_serve_answers_and_stops(finished: Finished, store: str) -> None:
    import signal
    import urllib.request

    words = ["serve", f"model/{finished.trained.model.key[:24]}", "--port", "0", "--store", store]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "kajiya", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line
        # Which runner drives the model, and why, where it is not the first choice.
        assert process.stdout.readline().startswith(("Engine: native, ", "Engine: transformers: "))
        with urllib.request.urlopen(f"{found[0]}/health", timeout=60) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    assert "torchao" not in err


def test_a_failed_proof_stops_the_training_with_its_remedy(tmp_path: Path) -> None:
    words = ("train", "stdlib-pretrain", *small_overrides("optim=adamw", "optim.lr=3", "train.compile=off"))
    done = kajiya_process(*words, "--store", str(tmp_path))
    assert done.returncode == 2, done.stderr
    error = done.stderr[done.stderr.index("error: ") :]
    assert error.startswith("error: learning: ")
    assert "Lower optim.lr" in error
    assert "preflight.skip=[learning]" in error
    (run,) = (tmp_path / "runs").iterdir()
    manifest = _json((run / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert [each["name"] for each in manifest["proof"]["findings"] if each["state"] == "failed"] == ["learning"]
    assert not {"model", "proof"} & manifest["artifacts"].keys()
    assert not list((run / "checkpoints").glob("*"))
