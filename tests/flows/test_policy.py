"""A policy trained from end to end: what it leaves, that it is proven, and that a kill changes nothing."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.flows.forked_trainings import finish, kill_behind, metrics_of

from kajiya.api import load
from kajiya.config.compose import compose
from kajiya.config.schema import ModelConfig
from kajiya.config.validate import CHECKS
from kajiya.data.batch import NO_TARGET
from kajiya.data.tokenizer import load_tokenizer
from kajiya.errors import ConfigError, DataError
from kajiya.flows.targets import find_model
from kajiya.flows.train import Trained, train
from kajiya.models.build import build_model, vocabulary_of
from kajiya.models.save import save_model
from kajiya.models.tasks import Task
from kajiya.run.events import read_events
from kajiya.run.folder import Run
from kajiya.run.forks import release
from kajiya.run.store import Store
from kajiya.training.probe import measure_steps

SMALL = (
    "model.hidden_size=32",
    "model.ffn_size=48",
    "model.n_heads=2",
    "model.n_kv_heads=2",
    "train.steps=8",
    "train.micro_batch=2",
    "train.loss.options.group_size=4",
    "train.eval_rows=8",
    "train.eval_every=4",
    "train.save_every=2",
    "train.log_every=1",
    "train.precision=fp32",
    "tokenizer.vocab_size=300",
    "track.trackers=[]",
)
FULL = ("train.loss.options.beta=0.05",)
LORA = ("adapter.name=lora", "adapter.options.r=4", "model.quantize=nf4", "train.loss.options.beta=0.05")
PHASES = (*LORA, "train.accumulate=2", "train.loss.options.inner_epochs=3")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of code whose lines have brackets."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        lines = [
            line
            for i in range(3)
            for line in (f"v{number} = t[f(x{i})]", f"v{number} = g(t[x{i}])", f"while t[v{number} + {i}]:")
        ]
        (folder / f"file_{number}.py").write_text("\n".join(lines))
    return f"data.source.options.root={folder}"


def _train(text: str, store: Path, *more: str) -> tuple[Trained, list[tuple[str, dict[str, Any]]]]:
    heard: list[tuple[str, dict[str, Any]]] = []
    config = compose("stdlib-grpo", [text, *SMALL, "data.duplicates=off", *more])
    trained = train(config, Store(store), on_event=lambda kind, **fields: heard.append((kind, fields)))
    return trained, heard


@pytest.mark.parametrize("more", [FULL, pytest.param(LORA, marks=pytest.mark.slow)], ids=["full", "qlora"])
def test_a_policy_is_proven_trained_evaluated_and_loads(
    text: str, more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []

    def measure(setup: Any, enough_s: float, heaviest: Any) -> Any:
        measured.append(heaviest)
        return measure_steps(setup, enough_s, heaviest)

    monkeypatch.setattr("kajiya.flows.planning.measure_steps", measure)
    trained, heard = _train(text, tmp_path, *more)
    # Memory is that of answers as long as they may be, whatever the model writes.
    most = trained.run.manifest()["config"]["train"]["loss"]["options"]["max_tokens"]
    assert {int(n) for each in measured for n in (each.rows.targets != NO_TARGET).sum(dim=1)} == {most}
    assert trained.model is not None
    manifest = trained.run.manifest()
    findings = {each["name"]: each for each in manifest["proof"]["findings"]}
    assert all(each["state"] != "failed" for each in findings.values())
    assert "engine drew from the model that is trained" in findings["start"]["text"]
    assert "with the advantage" in findings["learning"]["text"]
    assert manifest["plan"]["tokens_per_step"] > 2 * 4 * 6
    metrics = [fields["values"] for kind, fields in heard if kind == "metrics"]
    names = {name for values in metrics for name in values}
    told = {"reward", "reward_std", "rewards/exact_match", "alike", "length", "cut", "entropy", "clipped"}
    assert {f"train/{name}" for name in told | {"mismatch/ratio", "mismatch/difference"}} <= names
    assert {"eval/reward", "eval/loss"} <= names
    evaluations = [values for values in metrics if "eval/reward" in values]
    assert all(each["eval/reward_low"] <= each["eval/reward"] <= each["eval/reward_high"] for each in evaluations)
    divergences = [values["train/kl"] for values in metrics if "train/kl" in values]
    # The reference is the model before training: the first step is taken on it, the others away from it.
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert divergences[-1] > 1e-5
    assert all(values["train/mismatch/difference"] < 1e-3 for values in metrics if "train/loss" in values)
    samples = [fields for kind, fields in heard if kind == "sample"]
    assert len(samples) == 2 * 3
    assert samples[0].keys() == {"step", "prompt", "text", "reward"}
    entry = manifest["artifacts"]["evaluation"]
    figures = json.loads((tmp_path / entry["path"] / "figures.json").read_text())
    low, high = figures["reward"]["interval"]
    assert low <= figures["reward"]["value"] <= high
    model, _ = load(trained.model.path, tmp_path)
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()


def test_prompts_alone_are_judged_by_the_columns_of_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversations and texts; one's own reward sees the row, and no completion."""
    (tmp_path / "judging.py").write_text(
        "def fits(samples):\n"
        "    assert all(each.completion is None and each.row.keys() == {'wanted', 'tests'} for each in samples)\n"
        "    return [float(len(each.answer) >= each.row['wanted']) for each in samples]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    prompts = [[{"role": "user", "content": f"line {n}"}] if n % 2 else f"text {n}" for n in range(60)]
    rows = [{"prompt": prompt, "wanted": n % 3, "tests": [f"assert {n}"]} for n, prompt in enumerate(prompts)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = [{"name": "judging:fits"}, {"name": "unit_test", "options": {"program": "{row.tests}\n"}}]
    recipe = {
        "data": {
            "source": {"name": "jsonl", "options": {"files": "rows.jsonl"}},
            "keep": ["wanted", "tests"],
            "heldout_every": 5,
            "row_tokens": 64,
        },
        "model": {"n_params": None, "n_layers": 1, "n_kv_heads": 2},
        "train": {
            "loss": {"name": "grpo", "options": {"max_tokens": 4, "rewards": rewards}},
            "minutes": None,
            "save_every": None,
        },
    }
    (tmp_path / "own.yaml").write_text(json.dumps(recipe))
    more = [
        "train.steps=2",
        "train.loss.options.group_size=2",
        "eval.samples=0",
        f"preflight.skip=[{','.join(CHECKS)}]",
    ]
    small = [each for each in SMALL if not each.startswith(("train.steps", "train.save", "train.loss.options.group"))]
    trained = train(compose(str(tmp_path / "own.yaml"), [*small, *more]), Store(tmp_path / "store"))
    entry = trained.run.manifest()["artifacts"]["evaluation"]
    figures = json.loads((tmp_path / "store" / entry["path"] / "figures.json").read_text())
    # The test of row 0 fails alone.
    assert figures["rewards/unit_test"]["value"] >= 0.9
    assert 0 <= figures["rewards/fits"]["value"] <= 1


def test_a_reward_model_is_a_parent_and_another_in_its_folder_makes_another_policy(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    digests: list[str] = []
    first, _ = _train(text, tmp_path / "store", "train.steps=1", "eval.samples=0")
    assert first.model is not None
    tokenizer = load_tokenizer(first.model.path)
    for std in (0.1, 0.2):
        judge = build_model(ModelConfig(n_params="40k"), vocabulary_of(tokenizer), 0, Task("score")).module
        torch.nn.init.normal_(judge.score.weight, std=std)
        save_model(judge, tokenizer, folder)
        given = f"{{name: model, options: {{path: '{folder}', prompt_style: plain}}}}"
        rewards = f"train.loss.options.rewards=[{{name: exact_match}}, {given}]"
        settings = (rewards, "train.steps=2", "eval.samples=0")
        trained, _ = _train(text, tmp_path / "store", *settings)
        again, _ = _train(text, tmp_path / "store", *settings)
        assert trained.model is not None
        assert again.model is not None
        assert again.model.digest == trained.model.digest
        listed = trained.run.manifest()["artifacts"]
        found = find_model(str(folder), Store(tmp_path / "store")).model.digest
        assert listed["reward_1"]["digest"] == found
        parents = json.loads((trained.model.path / "manifest.json").read_text())
        assert parents["parents"]["reward_1"]["digest"] == found
        # Where it lies is no part of what is trained.
        assert str(folder) not in json.dumps(parents)
        digests.append(trained.model.digest)
    assert digests[0] != digests[1]


def test_what_cannot_be_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no reward"):
        compose("stdlib-grpo", ["train.loss.options.rewards=[]"])
    with pytest.raises(ConfigError, match="engine"):
        compose("stdlib-grpo", ["adapter.name=prompt"])
    with pytest.raises(ConfigError, match="group_size"):
        compose("stdlib-grpo", ["train.loss.options.group_size=1"])
    with pytest.raises(ConfigError, match="preference rows"):
        compose("stdlib-grpo", ["data.format=preference"])
    with pytest.raises(DataError, match="leave no room"):
        _train(text, tmp_path, "data.on_long=error", "train.loss.options.max_tokens=60", "data.row_tokens=64")


def _digest(run: Run, store: Path) -> str:
    """Of the trained weights."""
    folder = store / run.manifest()["artifacts"]["model"]["path"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.safetensors")))).hexdigest()


@pytest.fixture(scope="module")
def forks() -> Iterator[None]:
    """Behind the last test, the process from which trainings were forked is ended."""
    yield
    release()


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("more", [(), PHASES], ids=["full", "qlora-in-phases"])
def test_killed_twice_equals_uninterrupted_bit_for_bit(text: str, more: tuple[str, ...], tmp_path: Path) -> None:
    """The kills come between two lines of the log, where most of the time goes into answers."""
    unproven = f"preflight.skip=[{','.join(CHECKS)}]"
    settings = [text, *SMALL, "data.duplicates=off", "train.steps=14", "eval.samples=0", unproven, *more]
    whole = finish("stdlib-grpo", settings, tmp_path / "whole", is_evaluated=True)
    for step in (5, 9):
        kill_behind(step, "stdlib-grpo", settings, tmp_path / "killed", is_evaluated=True)
    rest = finish("stdlib-grpo", settings, tmp_path / "killed", is_evaluated=True)
    assert _digest(rest, tmp_path / "killed") == _digest(whole, tmp_path / "whole")
    assert metrics_of(rest.folder) == metrics_of(whole.folder)
    assert sum(each["kind"] == "started" for each in read_events(rest.folder)) == 3
