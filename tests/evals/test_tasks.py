"""Tasks on a real model: the packaged ones, one's own, lm-eval's beside its own backend; fingerprints that do not mix."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import Finished

from kajiya.config.tables import packaged_tasks
from kajiya.errors import ConfigError, DataError, StoreError
from kajiya.evals.answers import LocalModel
from kajiya.evals.results import TaskResult, compare_results, compared_words
from kajiya.evals.run_task import task_revision
from kajiya.evals.stdlib_rows import cut_body, program
from kajiya.evals.tasks import find_task, load_task, read_rows, read_task
from kajiya.flows.task_evaluation import Asked, evaluate_tasks
from kajiya.run.code import code_revision


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
    assert set(packaged_tasks()) == {"stdlib-body", "stdlib-call-cloze", "stdlib-next-line"}


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
    assert read_task(json.loads(json.dumps(load_task(Path(path)).settings()))).metrics == ("exact_match", "f1", "bleu")
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
        ({"metrics": ["accuracy"]}, "accuracy needs a task of kind choose, and this one's kind is generate"),
        ({"metrics": ["clustering"], "kind": "choose", "choices": ["a"]}, "needs a task of kind embed"),
        ({"metrics": ["bleu"], "kind": "embed"}, "bleu scores written answers, and this one's kind is embed"),
        ({"max_tokens": "64"}, r"max_tokens: '64' is not a whole number"),
        ({"stop": "end"}, r"stop: 'end' is not a list of texts"),
        ({"target": 5}, r"(?s)target: 5 is not text.*in quotes"),
        ({"choices": [1, 2]}, r"choices: \[1, 2\] is not text or a list of texts"),
        ({"is_chat": "yes"}, "is_chat: 'yes' is not true or false"),
        ({"max_tokens": 0}, "max_tokens: 0 is less than 1"),
        ({"judge": {"url": 1, "model": "m"}}, r"judge: url: 1 is not text"),
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
    low, high = found.facts["figures"]["pass@5"]["interval"]
    assert found.facts["n_groups"] == 2
    assert low == pytest.approx(0.3424, abs=1e-3)  # Wilson's of 2 of 2 sources
    assert high == 1.0


def test_the_k_of_pass_at_k_are_the_tasks(own_finished: Finished, tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "metrics": ["pass_at_k"],
        "tests": "assert '{{ answer }}' != ''",
        "samples": 4,
        "temperature": 1.0,
    }
    found = _evaluate(own_finished, str(_own_task(tmp_path, **more, k=[2, 4])), limit=2)[0]
    assert list(found.figures) == ["pass_at_k", "pass@2", "pass@4"]
    for k, problem in (
        ([8], "8 is more than the 4 samples"),
        ([0], "no list of whole numbers"),
        (3, "no list of whole"),
    ):
        with pytest.raises(ConfigError, match=problem):
            load_task(_own_task(tmp_path, **more, k=k))


def _own_code(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> None:
    (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))


def test_an_edited_function_is_another_evaluation(
    own_finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "def strip(row, answer):\n    return answer.strip()\n"
    _own_code(tmp_path, monkeypatch, "own_answers", source)
    path = str(_own_task(tmp_path, metrics=["exact_match"], function="own_answers:strip"))
    first = _evaluate(own_finished, path, limit=2)[0]
    assert _evaluate(own_finished, path, limit=2)[0].folder == first.folder
    (tmp_path / "own_answers.py").write_text(source.replace("strip()", "strip(')')"))
    second = _evaluate(own_finished, path, limit=2)[0]
    assert second.folder != first.folder
    assert first.fingerprint.differences(second.fingerprint) == ["code"]
    with pytest.raises(ConfigError, match="has no function 'stripp'"):
        load_task(_own_task(tmp_path, function="own_answers:stripp"))


def test_a_mended_metric_unmakes_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(_own_task(tmp_path, kind="choose", choices=["a", "b"], metrics=["auroc"]))
    before = task_revision(task)
    read = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: read(path) + (b"# mended" if path.name == "metrics_labels.py" else b"")
    )
    code_revision.cache_clear()
    assert task_revision(task) != before
    code_revision.cache_clear()


def test_the_dtype_is_the_one_that_the_engine_computes_in(
    own_finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = LocalModel(own_finished.trained.model.path, 2)
    assert local.dtype("choose") == str(next(local.model.parameters()).dtype).removeprefix("torch.")
    for has_bf16, precision, dtype in ((True, "bf16", "bfloat16"), (False, "fp32", "float32")):
        monkeypatch.setattr("kajiya.serving.loading.has_bf16_instructions", lambda has=has_bf16: has)
        local = LocalModel(own_finished.trained.model.path, 2)
        assert local.dtype("generate") == dtype
        assert f"weights in {precision}" in local._engine.facts.note


def test_errors_are_ranked_by_a_metric_of_rows(own_finished: Finished, tmp_path: Path) -> None:
    path = str(_own_task(tmp_path, metrics=["bleu", "f1", "exact_match"]))
    found = _evaluate(own_finished, path)[0]
    marks = [row["f1: statistics"][0] for row in found.misses()]
    assert marks == sorted(marks)
    assert max(marks) < 1
    with pytest.raises(StoreError, match=r"bleu says nothing of a single row.*those that do: f1, exact_match"):
        found.misses("bleu")
    with pytest.raises(StoreError, match="has no metric 'blue'"):
        found.misses("blue")
    alone = _evaluate(own_finished, str(_own_task(tmp_path, metrics=["bleu"])))[0]
    with pytest.raises(StoreError, match="add one that does, for example exact_match"):
        alone.misses()


def test_a_metric_of_ones_own_that_is_no_mean_is_compared(
    own_finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "import numpy as np\nfrom kajiya.evals.metrics import Measured\nfrom kajiya.evals.statistics import Scores\n\n\n"
        "def longest(answers, task):\n"
        "    rows = np.array([[len(each.text) / task.max_tokens] for each in answers])\n"
        "    return Measured(Scores(rows, lambda drawn: float(drawn.max()), by_rows=True))\n"
    )
    _own_code(tmp_path, monkeypatch, "own_longest", source)
    path = _own_task(tmp_path, metrics=["own_longest:longest", "f1"])
    first = _evaluate(own_finished, str(path))[0]
    found = compare_results(first, first, "own_longest:longest")
    assert found.first == found.second == first.figures["own_longest:longest"]["value"]
    assert compared_words(first, found, "own_longest:longest", ("A", "B")).startswith("no difference shown")
    words = compared_words(first, compare_results(first, first, "f1"), "f1", ("A", "B"))
    assert "(0 ± 0 points, p = 1)" in words

    def fails(answers: Any, task: Any) -> Any:
        raise ZeroDivisionError("no rows")

    monkeypatch.setattr("own_longest.longest", fails)
    with pytest.raises(StoreError, match="own_longest:longest fails on the rows that were kept: ZeroDivisionError"):
        compare_results(first, first, "own_longest:longest")


def test_bodies_of_heldout_functions_are_asked_and_run(
    own_finished: Finished, small_config: Any, tmp_path: Path
) -> None:
    """The packaged task `stdlib-body`, from the rows to pass@1."""
    function = '''def add_{n}(a, b):
    """The sum.

    >>> add_{n}({n}, 2)
    {sum}
    """
    return a + b


def wrong_{n}(a):
    """Its example does not hold.

    >>> wrong_{n}(1)
    2
    """
    a = a * 3
    return a


def untold_{n}(a):
    """No example."""
    return a
'''
    for n in range(12):
        own = "".join(f"value_{n}_{i} = {n * i}\n" for i in range(60))  # no file is nearly another
        text = f"{own}\n\n" + function.format(n=n, sum=n + 2)
        (tmp_path / f"module_{n}.py").write_text(text)
    config = small_config(f"data.source.options.root={tmp_path}", "data.heldout_every=3", "data.duplicates=off")
    asked = Asked(str(own_finished.trained.model.path), ["stdlib-body"])
    found = evaluate_tasks(asked, config, own_finished.store)[0]
    rows = [json.loads(row["row"]) for row in found.rows()]
    assert 0 < len(rows) < 12
    assert all(row["name"].startswith("add_") and row["body"] == "    return a + b\n" for row in rows)
    assert found.figures["pass_at_k"]["value"] == 0.0
    assert all(row["pass_at_k: note"].startswith("0 of 1 passed; the first: ") for row in found.rows())
    assert 0 <= found.figures["chrf"]["value"] <= 100
    assert found.facts["n_groups"] == len(rows)


_LM_EVAL_TASK = """task: {name}
output_type: {output}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/{rows}.jsonl
test_split: test
num_fewshot: 0
doc_to_text: '{{{{q}}}}'
{more}
"""


def _lm_eval_tasks(folder: Path) -> None:
    """A group of two tasks of different size, and a task whose answers go through two filters."""
    for rows, n in (("few", 3), ("many", 9)):
        lines = [{"q": f"import os\nfor x{i} in", "a": [" range(3):", " self.items:"], "t": " r", "r": i % 2, "s": 1 - i % 2}
                 for i in range(n)]  # fmt: skip
        (folder / f"{rows}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        more = "doc_to_choice: '{{a}}'\ndoc_to_target: r\nmetric_list:\n  - metric: acc\n  - metric: f1\n"
        body = _LM_EVAL_TASK.format(name=f"own_{rows}", output="multiple_choice", folder=folder, rows=rows, more=more)
        (folder / f"{rows}.yaml").write_text(body)
    for name, weighs in (("own_group", "true"), ("own_flat", "false")):
        (folder / f"{name}.yaml").write_text(
            f"group: {name}\ntask:\n  - own_few\n  - own_many\naggregate_metric_list:\n"
            f"  - metric: acc\n    aggregation: mean\n    weight_by_size: {weighs}\n"
        )
    more = (
        "doc_to_target: '{{t}}'\ngeneration_kwargs:\n  until: ['\\n']\n  max_gen_toks: 4\nmetric_list:\n"
        "  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
        "filter_list:\n  - name: whole\n    filter:\n      - function: take_first\n"
        "  - name: letter\n    filter:\n      - function: regex\n        regex_pattern: '( r|[^ ])'\n      - function: take_first\n"
    )
    body = _LM_EVAL_TASK.format(name="own_filters", output="generate_until", folder=folder, rows="many", more=more)
    (folder / "filters.yaml").write_text(body)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_groups_and_filters_of_lm_eval_are_read_whole(own_finished: Finished, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    _lm_eval_tasks(tmp_path)
    names = [f"lm-eval:{tmp_path}/{name}.yaml" for name in ("own_group", "own_flat", "filters")]
    group, flat, filters = _evaluate(own_finished, *names)

    # A group is its own figure and those of its tasks, over the rows of all.
    assert group.task == "own_group"
    assert group.facts["n_rows"] == len(group.rows()) == 12
    figures = group.figures
    assert {"acc", "own_few: acc", "own_many: acc", "own_many: f1"} <= figures.keys()
    few, many = figures["own_few: acc"]["value"], figures["own_many: acc"]["value"]
    assert figures["acc"]["value"] == pytest.approx((3 * few + 9 * many) / 12)
    assert flat.figures["acc"]["value"] == pytest.approx((few + many) / 2)
    for result in (group, flat):
        low, high = result.figures["acc"]["interval"]
        assert low <= result.figures["acc"]["value"] <= high
    assert {json.loads(row["row"])["task"] for row in group.rows()} == {"own_few", "own_many"}
    assert compare_results(group, group, "own_many: acc").first == pytest.approx(many)
    assert len(group.misses("acc")) == round(12 - 3 * few - 9 * many)

    # Two filters are two figures over the same nine rows, not one over eighteen.
    assert filters.facts["n_rows"] == len(filters.rows()) == 9
    assert filters.figures.keys() == {"exact_match,whole", "exact_match,letter"}
    assert all(each["interval"] is not None for each in filters.figures.values())
    assert all(row["answers"][0] != "" for row in filters.rows())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_edited_rows_and_tasks_of_lm_eval_are_asked_anew(own_finished: Finished, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    _lm_eval_tasks(tmp_path)
    name = f"lm-eval:{tmp_path}/few.yaml"
    first = _evaluate(own_finished, name)[0]
    assert _evaluate(own_finished, name)[0].folder == first.folder
    path = tmp_path / "few.yaml"
    path.write_text(path.read_text().replace("doc_to_target: r", "doc_to_target: s"))
    second = _evaluate(own_finished, name)[0]
    assert second.figures["acc"]["value"] == pytest.approx(1 - first.figures["acc"]["value"])
    assert first.fingerprint.differences(second.fingerprint) == ["template"]
    rows = tmp_path / "few.jsonl"
    rows.write_text(rows.read_text().replace("import os", "import re"))
    third = _evaluate(own_finished, name)[0]
    assert second.fingerprint.differences(third.fingerprint) == ["data"]


def test_lm_evals_figures_of_rows_that_are_no_mean_have_intervals() -> None:
    from kajiya.evals.lm_eval_results import figures_of

    random = np.random.default_rng(0)
    pairs = [(int(a), int(b)) for a, b in random.integers(0, 2, (40, 2))]
    samples = [
        {"filter": "none", "f1": pair, "acc": float(pair[0] == pair[1]), "doc": {"q": i}, "target": pair[0],
         "arguments": [("q", " a"), ("q", " b")], "filtered_resps": [(-1.0, True), (-2.0, False)]}
        for i, pair in enumerate(pairs)
    ]  # fmt: skip

    def f1(items: Any) -> float:
        both = sum(a and b for a, b in items)
        return 2 * both / max(1, sum(a + b for a, b in items))

    accuracy = float(np.mean([sample["acc"] for sample in samples]))
    raw = {
        "results": {"own": {"alias": "own", "sample_len": 40, "f1,none": f1(pairs), "f1_stderr,none": "N/A",
                            "acc,none": accuracy}},
        "samples": {"own": samples}, "group_subtasks": {}, "versions": {"own": 1},
        "higher_is_better": {"own": {"f1": True, "acc": True}},
    }  # fmt: skip
    found = figures_of(raw, {"own": {"f1": f1, "acc": np.mean}})
    assert found.figures.keys() == {"f1", "acc"}
    low, high = found.figures["f1"]["interval"]
    assert low < f1(pairs) < high
    assert (found.figures["f1"]["is_mean"], found.figures["acc"]["is_mean"]) == (False, True)
    assert found.figures["acc"]["points"] == 100
    assert found.measured.keys() == {"acc"}
    assert found.columns["answers"][0] == [" a"]


def test_perplexities_of_lm_eval_are_compared_in_pairs() -> None:
    from kajiya.evals.lm_eval_results import figures_of

    random = np.random.default_rng(1)

    def read(shift: float) -> Any:
        pairs = [
            (-float(nats), int(words)) for nats, words in zip(random.normal(40 + shift, 2, 60), words_of, strict=True)
        ]
        samples = [
            {"filter": "none", "word_perplexity": pair, "bits_per_byte": pair, "perplexity": pair[0], "doc": {"q": i}, "target": "",
             "arguments": [("q",)], "filtered_resps": [-1.0]}
            for i, pair in enumerate(pairs)
        ]  # fmt: skip
        nats, words = map(sum, zip(*pairs, strict=True))
        values = {"word_perplexity": np.exp(-nats / words), "bits_per_byte": -nats / words / np.log(2),
                  "perplexity": np.exp(-nats / 60)}  # fmt: skip
        raw = {"results": {"own": {f"{name},none": float(value) for name, value in values.items()}},
               "samples": {"own": samples}, "group_subtasks": {}, "versions": {"own": 1},
               "higher_is_better": {"own": dict.fromkeys(values, False)}}  # fmt: skip
        return figures_of(raw, {"own": {}}), values

    words_of = random.integers(8, 12, 60)
    (first, values), (second, others) = read(0.0), read(-2.0)

    def result(found: Any) -> TaskResult:
        rows = [{"group": str(i)} | {f"{name}: statistics": each.scores.rows[i].tolist() for name, each in found.measured.items()}
                for i in range(60)]  # fmt: skip
        facts = {"task": "own", "figures": found.figures, "fingerprint": dict.fromkeys(
            ("data", "template", "code", "engine", "dtype", "sampling", "model"), "same")}  # fmt: skip
        kept = TaskResult(Path(), facts)
        object.__setattr__(kept, "rows", lambda: rows)
        return kept

    for name, value in values.items():
        low, high = first.figures[name]["interval"]
        assert low < value < high
        compared = compare_results(result(first), result(second), name)
        assert (compared.first, compared.second) == (pytest.approx(value), pytest.approx(others[name]))
        assert compared.p_value < 0.01
    first.figures["corpus"] = {"is_mean": False, "of_sums": None, "is_lower_better": False, "points": None}
    with pytest.raises(StoreError, match="own: corpus is made of all rows at once"):
        compare_results(result(first), result(second), "corpus")


def test_generation_arguments_of_lm_eval_are_read_as_its_own_backend_reads_them() -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from kajiya.evals.lm_eval_engine import drawing_of, prompt_room

    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert drawing_of({"until": ["\n", ""], name: 32}).params.max_tokens == 32
    plain = drawing_of({"until": "\n", "num_beams": 1, "early_stopping": True})
    assert (plain.stop, plain.params.temperature, plain.params.max_tokens) == (("\n",), 0.0, 256)
    assert drawing_of({"until": ["", "a"]}).stop == ("a",)
    warm = drawing_of({"temperature": 0.7, "top_p": 0.95, "top_k": 20}).params
    assert (warm.temperature, warm.top_p, warm.top_k) == (0.7, 0.95, 20)
    cold = drawing_of({"do_sample": False, "temperature": 0.7, "top_p": 0.95}).params
    assert (cold.temperature, cold.top_p) == (0.0, 1.0)
    for name, value in (("num_beams", 10), ("repetition_penalty", 1.2), ("max_length", 99)):
        with pytest.raises(ConfigError, match=rf"generation_kwargs\.{name}: {value} of a task of lm-eval"):
            drawing_of({name: value})
    assert prompt_room(64, 60) == 4
    with pytest.raises(DataError, match="answers of up to 64 tokens, and the model's context has 64"):
        prompt_room(64, 64)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_on_the_engine_equals_its_own_backend(
    own_finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    monkeypatch.setattr("kajiya.serving.loading.has_bf16_instructions", lambda: False)  # theirs computes in fp32
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from kajiya.evals.lm_eval_engine import open_tasks, run_lm_eval
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
    opened = open_tasks([str(tmp_path / f"{name}.yaml") for name in ("choice", "text", "write")])
    ours = run_lm_eval(folder, opened, limit=None, batch=4)
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
