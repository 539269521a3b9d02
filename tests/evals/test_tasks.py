"""Tasks on a real model: the packaged ones, one's own, lm-eval's beside its own backend; fingerprints that do not mix."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import Finished

from kajiya.errors import ConfigError, DataError, StoreError
from kajiya.evals.answers import LocalModel
from kajiya.evals.run_task import TaskResult, compare_results
from kajiya.evals.stdlib_rows import cut_body, program
from kajiya.evals.tasks import find_task, list_tasks, load_task, read_rows
from kajiya.flows.task_evaluation import Asked, evaluate_tasks


def _evaluate(own_finished: Finished, *tasks: str, **more: Any) -> list[TaskResult]:
    return evaluate_tasks(Asked(own_finished.trained.run.id, tasks, **more), own_finished.config, own_finished.store)


def test_packaged_tasks_on_a_run(own_finished: Finished) -> None:
    line, cloze = _evaluate(own_finished, "stdlib-next-line", "stdlib-call-cloze", limit=6)
    assert line.facts["n_rows"] == cloze.facts["n_rows"] == 6
    assert 0 <= line.facts["figures"]["chrf"]["value"] <= 100
    low, high = cloze.facts["figures"]["accuracy"]["interval"]
    assert 0 <= low <= cloze.facts["figures"]["accuracy"]["value"] <= high <= 1
    rows = cloze.rows()
    assert all(len(row["choices"]) == len(row["logprobs"]) == 4 for row in rows)
    engine = LocalModel(own_finished.trained.model.path, 4)
    ids = engine._ids(rows[0]["prompt"], False, 64)
    choice = engine._encode(rows[0]["choices"][0])
    by_engine = sum(engine._engine.score([*ids, *choice][-65:])[-len(choice) :])
    if len(engine._encode(rows[0]["prompt"])) + len(choice) < 64:
        assert rows[0]["logprobs"][0] == pytest.approx(by_engine, abs=1e-3)
    # The run lists them, and the same question is answered from the store.
    assert "task stdlib-call-cloze" in own_finished.trained.run.manifest()["artifacts"]
    assert _evaluate(own_finished, "stdlib-call-cloze", limit=6)[0].folder == cloze.folder
    assert set(list_tasks()) == {"stdlib-body", "stdlib-call-cloze", "stdlib-next-line"}


def test_bodies_are_run_by_their_own_examples() -> None:
    row = {
        "before": 'def double(x):\n    """Twice.\n\n    >>> double(4)\n    8\n    """\n', "after": "\nother = 1\n",
        "body": "    return 2 * x\n", "name": "double", "package": "",
    }  # fmt: skip
    from kajiya.evals.sandbox import run_program

    def passes(answer: str) -> bool:
        return run_program(program(row, cut_body(row, answer)), seconds=10, memory_mb=512).is_passed

    assert passes("    return x + x\nprint('past the body')")
    assert not passes("    return x\n")
    assert cut_body(row, "    a\n\n    b\nc\n").rstrip() == "    a\n\n    b"


def _own_task(folder: Path, **more: Any) -> Path:
    rows = [{"q": f"def f{i}(", "a": "self):", "who": f"s{i % 3}"} for i in range(9)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    body = {"rows": "rows.jsonl", "prompt": "{{ q }}", "target": "{{ a }}", "metrics": ["exact_match", "f1", "bleu"],
            "group": "who", "max_tokens": 6} | more  # fmt: skip
    (folder / "mine.yaml").write_text(json.dumps(body))
    return folder / "mine.yaml"


def test_a_task_of_ones_own_and_its_fingerprint(own_finished: Finished, tmp_path: Path) -> None:
    path = str(_own_task(tmp_path))
    first = _evaluate(own_finished, path)[0]
    assert first.facts["n_groups"] == 3
    assert first.facts["figures"]["bleu"]["signature"].startswith("nrefs:1")
    assert len(first.misses("exact_match")) >= 1
    same = compare_results(first, first, "bleu")
    assert same.difference == 0
    other = _evaluate(own_finished, str(_own_task(tmp_path, temperature=0.5)))[0]
    assert first.fingerprint.differences(other.fingerprint) == ["template", "sampling"]
    with pytest.raises(StoreError, match="differ in template, sampling"):
        compare_results(first, other, "f1")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"metric": ["f1"]}, "did you mean 'metrics'"),
        ({"metrics": ["blue"]}, "did you mean 'bleu'"),
        ({"kind": "choice"}, "is not one of generate"),
        ({"kind": "choose"}, "choices: is missing"),
        ({"metrics": ["pass_at_k"]}, "tests: is missing"),
        ({"samples": 4}, "are all the same"),
    ],
)
def test_mistakes_in_a_task_are_named(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_task(_own_task(tmp_path, **change))


def test_mistakes_in_rows_are_named(tmp_path: Path) -> None:
    task = load_task(_own_task(tmp_path))
    (tmp_path / "rows.jsonl").write_text('{"q": 1}\n{oops')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: is not JSON"):
        read_rows(task, None, None)
    with pytest.raises(DataError, match="no file matches"):
        read_rows(replace(task, rows="none*.jsonl"), None, None)
    with pytest.raises(ConfigError, match="did you mean 'stdlib-body'"):
        find_task("stdlib-bodi")


def test_programs_of_samples_are_counted(own_finished: Finished, tmp_path: Path) -> None:
    path = _own_task(
        tmp_path, metrics=["pass_at_k"], tests="assert {{ answer | length }} >= 0", samples=5, temperature=1.0
    )
    found = _evaluate(own_finished, str(path), limit=3)[0]
    assert found.facts["figures"]["pass_at_k"]["value"] == 1.0
    assert found.rows()[0]["pass_at_k: note"].startswith("5 of 5 passed")
    assert found.facts["figures"]["pass@5"]["interval"] == [1.0, 1.0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_on_the_engine_equals_its_own_backend(own_finished: Finished, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from kajiya.evals.lm_eval_engine import run_lm_eval
    from kajiya.models.load import load_model

    rows = [{"q": f"import os\nfor x{i} in", "a": [" range(3):", " self.items:"], "text": f"def f{i}(a):\n    return a\n" * 9}
            for i in range(8)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    shared = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\n"
        "test_split: test\nnum_fewshot: 0\n"
    )
    (tmp_path / "choice.yaml").write_text(
        "task: own_choice\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{a}}'\ndoc_to_target: 0\n"
        "metric_list:\n  - metric: acc\n" + shared
    )
    (tmp_path / "text.yaml").write_text(
        "task: own_text\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: bits_per_byte\n" + shared
    )
    (tmp_path / "write.yaml").write_text(
        "task: own_write\noutput_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: ' range'\n"
        "generation_kwargs:\n  until: ['\\n']\n  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match\n" + shared
    )
    folder = tmp_path / "model"
    shutil.copytree(own_finished.trained.model.path, folder)
    load_model(own_finished.trained.model.path, dtype=torch.float32).save_pretrained(folder)  # bf16 rounds by shape
    names = ["own_choice", "own_text", "own_write"]
    ours = run_lm_eval(
        folder, [str(tmp_path / f"{name}.yaml") for name in ("choice", "text", "write")], limit=None, batch=4
    )
    local = LocalModel(folder, 4)
    backend = HFLM(pretrained=load_model(folder, dtype=torch.float32), tokenizer=local._tokenizer, batch_size=4,
                   max_length=local.context_tokens)  # fmt: skip
    theirs = simple_evaluate(model=backend, tasks=names, task_manager=TaskManager(include_path=str(tmp_path)),
                             log_samples=True, bootstrap_iters=0)  # fmt: skip
    for name in names:
        for a, b in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert a["doc_id"] == b["doc_id"]
            if name == "own_write":
                assert a["resps"] == b["resps"]
            else:
                got, want = (np.array([float(each[0][0] if isinstance(each[0], (list, tuple)) else each[0]) for each in s["resps"]])
                             for s in (a, b))  # fmt: skip
                assert np.allclose(got, want, atol=2e-3), name
    for name, metric in (("own_choice", "acc,none"), ("own_text", "bits_per_byte,none")):
        assert ours["results"][name][metric] == pytest.approx(theirs["results"][name][metric], abs=1e-4)
