"""Models judged on their held-out rows: figures against scikit-learn, every row kept, two runs paired, `kajiya eval`."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from kajiya.cli import app
from kajiya.config.compose import compose
from kajiya.config.validate import CHECKS
from kajiya.errors import ConfigError
from kajiya.evals.results import TaskResult, compare_results
from kajiya.evals.statistics import ratio_interval
from kajiya.flows.evaluate import evaluate, heldout_config
from kajiya.flows.kind_evaluation import source_of
from kajiya.flows.report import report_targets, write_report
from kajiya.flows.task_evaluation import Asked, evaluate_tasks
from kajiya.flows.train import Trained, train
from kajiya.run.store import Store, open_artifact

_SMALL = f"""
model: {{hidden_size: 32, n_layers: 1, n_heads: 2, n_kv_heads: 2, ffn_size: 48, n_params: null}}
tokenizer: {{vocab_size: 300}}
track: {{trackers: []}}
eval: {{samples: 0, baselines: []}}
preflight: {{skip: [{", ".join(CHECKS)}]}}
"""
_TRAIN = "steps: 12, minutes: null, micro_batch: 4, precision: fp32, eval_rows: 4, eval_every: 12, save_every: 12"
_COLOURS = ("red", "green", "blue")


@dataclass(frozen=True)
class Judged:
    """A trained model and its evaluation."""

    trained: Trained
    result: TaskResult


def _recipe(folder: Path, loss: str) -> Path:
    """Rows whose label their text tells, and a recipe for them."""
    rows = []
    for i in range(90):
        colour = _COLOURS[i * i % 7 % 3]
        said = colour if i % 4 else _COLOURS[i % 3]  # not all can be right
        label: Any = said if loss == "classify" else round(math.sin(i) + len(colour), 3)
        rows.append({"text": f"{colour} thing number {i} is {colour}", "label": label})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = f"{{name: jsonl, options: {{files: {folder}/rows.jsonl}}}}"
    data = f"data: {{source: {source}, format: labelled, row_tokens: 64, heldout_every: 3, duplicates: 'off'}}\n"
    text = f"name: {loss}-colours\n{data}train: {{loss: {{name: {loss}}}, {_TRAIN}}}\n{_SMALL}"
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return folder / "recipe.yaml"


def _train(folder: Path, loss: str, store: Store, *more: str) -> Judged:
    trained = train(compose(str(_recipe(folder, loss)), more), store)
    entry = trained.run.manifest()["artifacts"]["evaluation"]
    artifact = open_artifact(store.root / entry["path"])
    return Judged(trained, TaskResult(artifact.path, artifact.facts))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def classifiers(store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Judged, Judged]:
    folder = tmp_path_factory.mktemp("classify")
    return tuple(_train(folder, "classify", store, f"seed={seed}") for seed in (0, 1))  # type: ignore[return-value]


def test_a_classifier_has_f1_auroc_calibration_and_a_confusion_matrix(classifiers: tuple[Judged, Judged]) -> None:
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, roc_auc_score

    result = classifiers[0].result
    rows = result.rows()
    names = sorted(_COLOURS)
    assert len(rows) == result.facts["n_rows"] > 20
    assert rows[0]["choices"] == names
    right = np.array([names.index(row["target"]) for row in rows])
    shares = np.exp(np.array([row["logprobs"] for row in rows]))
    picked = shares.argmax(axis=1)
    figures = {name: each["value"] for name, each in result.figures.items()}
    assert figures["accuracy"] == pytest.approx(accuracy_score(right, picked))
    assert figures["macro_f1"] == pytest.approx(f1_score(right, picked, average="macro"))
    assert figures["auroc"] == pytest.approx(roc_auc_score(right, shares, multi_class="ovr"))
    assert figures["nll"] == pytest.approx(log_loss(right, shares), abs=1e-4)
    assert figures.keys() >= {"ece", "loss"}
    details = result.figures["macro_f1"]["details"]
    assert details == {"classes": names, "confusion": confusion_matrix(right, picked, labels=range(3)).tolist()}
    for name, each in result.figures.items():
        low, high = each["interval"]
        assert low < high
        assert name == "ece" or low <= each["value"] <= high, name  # resampling adds to a calibration error
    # Rows are resampled, not batches of them; a prompt is what the model has read.
    losses = np.array([row["nll: statistics"] for row in rows])
    assert losses.shape == (len(rows), 2)
    wide = ratio_interval(losses[:, 0], losses[:, 1])
    assert result.figures["nll"]["interval"] == pytest.approx(list(wide), rel=0.05)
    assert rows[0]["prompt"].startswith(tuple(_COLOURS))


def test_two_classifiers_are_compared_row_by_row(
    classifiers: tuple[Judged, Judged], store: Store, tmp_path: Path
) -> None:
    first, second = (each.result for each in classifiers)
    found = compare_results(first, second, "accuracy")
    assert found.test == "exact McNemar"
    assert found.second - found.first == pytest.approx(
        second.figures["accuracy"]["value"] - first.figures["accuracy"]["value"]
    )
    anew = compare_results(first, second, "auroc")
    assert anew.first == pytest.approx(first.figures["auroc"]["value"])
    page = write_report([each.trained.run for each in classifiers], tmp_path / "report").read_text(encoding="utf-8")
    for words in (
        "B − A: accuracy",
        "B − A: macro_f1",
        "exact McNemar",
        "how often each class (down) was taken",
        " points, p =",
    ):
        assert words in page
    assert "cannot be read (see Problems)" not in page
    assert "On loss, " in page


def test_kajiya_eval_judges_a_classifier_on_its_own_rows(classifiers: tuple[Judged, Judged], store: Store) -> None:
    judged = classifiers[0]
    again, baselines = evaluate(judged.trained.run.id, compose("stdlib-pretrain"), store)
    assert baselines is None
    assert again.path == judged.result.folder
    words = ["eval", judged.trained.run.id, "--store", str(store.root), "--show-errors", "--metric", "accuracy"]
    told = CliRunner().invoke(app, words, catch_exceptions=False)
    assert told.exit_code == 0
    for part in ("auroc", "right \\ picked", "rows without full marks", "target: "):
        assert part in told.stdout
    for target in (judged.trained.run.id, str(judged.trained.model.path)):
        with pytest.raises(ConfigError, match="is a classifier: it writes no text"):
            evaluate_tasks(Asked(target, ["stdlib-next-line"]), compose("stdlib-pretrain"), store)
    with pytest.raises(ConfigError, match="by the run that trained it"):
        evaluate(str(judged.trained.model.path), compose("stdlib-pretrain"), store)


def test_a_regressor_has_r2(store: Store, tmp_path: Path) -> None:
    from sklearn.metrics import r2_score, root_mean_squared_error

    result = _train(tmp_path, "regress", store).result
    rows = result.rows()
    right, said = (np.array([float(value) for value in column]) for column in (
        [row["target"] for row in rows], [row["answers"][0] for row in rows]))  # fmt: skip
    figures = {name: each["value"] for name, each in result.figures.items()}
    assert figures["r2"] == pytest.approx(r2_score(right, said), abs=1e-4)
    assert figures["rmse"] == pytest.approx(root_mean_squared_error(right, said), abs=1e-4)
    assert figures["absolute_error"] == pytest.approx(np.abs(right - said).mean(), abs=1e-4)
    assert result.figures["r2"]["interval"] is not None


def test_other_losses_keep_their_rows_too(store: Store, tmp_path: Path) -> None:
    """Preference pairs of files of code: each pair a row, each file a source."""
    source = "{name: stdlib_pairs, options: {rows: preference, packages: asyncio email unittest, max_bytes: 500}}"
    data = f"data: {{source: {source}, row_tokens: 768, on_long: drop, max_lost_fraction: 1, heldout_every: 4}}\n"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: pairs\n{data}train: {{loss: {{name: orpo}}, {_TRAIN}}}\n{_SMALL}", encoding="utf-8")
    trained = train(compose(str(recipe), ["train.steps=2"]), store)
    artifact = open_artifact(store.root / trained.run.manifest()["artifacts"]["evaluation"]["path"])
    table = pyarrow.parquet.read_table(artifact.path / "rows.parquet").to_pylist()
    assert len(table) == artifact.facts["n_rows"]
    assert [source_of(row["row"]) for row in table] == [row["group"] for row in table]
    assert 1 < artifact.facts["n_groups"] < len(table)
    figures = artifact.facts["figures"]
    for name in ("loss", "rewards/accuracies", "nll"):
        totals, counts = np.array([row[f"{name}: statistics"] for row in table]).sum(axis=0)
        assert figures[name]["value"] == pytest.approx(totals / counts)
        assert counts == figures[name]["n"] == len(table)
    assert not figures["logps/chosen"]["is_judged"]
    result = TaskResult(artifact.path, artifact.facts)
    assert compare_results(result, result, "rewards/accuracies").difference == 0
    with pytest.MonkeyPatch.context() as patch:
        # What has become of the sources since does not matter: they are not looked at.
        patch.setattr("kajiya.flows.evaluate.build_corpus", None)
        again, baselines = evaluate(trained.run.id, heldout_config(trained.run.id, None, [], store), store)
    assert (again.path, baselines) == (artifact.path, None), "judged on its own rows, which are no text"
    assert heldout_config(trained.run.id, None, [], store, for_tasks=True).data.source.name == "stdlib"
    assert heldout_config(trained.run.id, None, ["seed=9"], store).seed == 9
    assert heldout_config(trained.run.id, "stdlib-pretrain", [], store) == compose("stdlib-pretrain")
    assert heldout_config("http://nowhere/v1", None, [], store) == compose("stdlib-pretrain")


def test_sources_are_files_of_code_and_lines_stand_alone() -> None:
    names = ("email/utils.py:quote (body)", "rows.jsonl:12", "plain")
    assert [source_of(name) for name in names] == ["email/utils.py", "rows.jsonl:12", "plain"]


def test_a_folder_is_compared_with_a_run(finished: Any, tmp_path: Path) -> None:
    """A model that is no run's: its results are found in the store by its weights, its held-out text among them."""
    import shutil

    store = Store(tmp_path / "store")
    shutil.copytree(finished.store.root, store.root)
    folder = shutil.copytree(finished.trained.model.path, tmp_path / "folder")
    (folder / "manifest.json").unlink()
    rows = [{"q": f"def f{i}(self", "a": "):", "b": " import"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {"rows": "rows.jsonl", "kind": "choose", "prompt": "{{ q }}", "choices": ["{{ a }}", "{{ b }}"], "target": "0",
            "metrics": ["accuracy"]}  # fmt: skip
    (tmp_path / "closing.yaml").write_text(json.dumps(task))
    run = finished.trained.run.id
    for target in (run, str(folder)):
        evaluate_tasks(Asked(target, [str(tmp_path / "closing.yaml")]), finished.config, store)
    evaluate(str(folder), finished.config, store)
    page = report_targets([run, str(folder)], store, tmp_path / "report").read_text(encoding="utf-8")
    assert "accuracy: no difference shown between A and B (0 ± 0 points, p = 1)" in page
    assert "bits_per_byte: no difference shown between A and B" in page
    assert f"B · {folder}" in page
