"""A task: rows, a prompt made of each, what counts as right, and the metrics; a small YAML over rows of one's own."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kajiya.config.digest import digest
from kajiya.config.plain_types import check_types
from kajiya.config.tables import check_choice, check_task, import_target, nearest, packaged_tasks
from kajiya.data.documents import Documents
from kajiya.errors import ConfigError, DataError

Row = Mapping[str, Any]
KINDS = ("generate", "choose", "embed")
_METRICS_OF: Mapping[str, tuple[str, ...]] = {
    "choose": ("accuracy", "accuracy_by_byte", "macro_f1", "auroc", "ece"),
    "embed": ("recall_at_k", "clustering"),
}
"""Metrics that only answers of a kind can have; the others score texts."""
_LEAST = {"max_tokens": 1, "samples": 1, "temperature": 0, "seconds": 0.1, "memory_mb": 64}
"""Smallest value of a task's numbers."""


@dataclass(frozen=True)
class JudgeConfig:
    """A language model that compares the answer with the reference, behind an OpenAI-compatible API."""

    url: str
    """Address with its version, for example `http://127.0.0.1:8000/v1`."""
    model: str
    """Name of the judging model there."""
    question: str = "Which answer serves the request better?"
    """What it is asked of the two answers."""
    max_tokens: int = 256
    """Longest judgement, tokens."""
    key_variable: str | None = None
    """Environment variable that holds the key which it wants; the key itself stands in no file."""


@dataclass(frozen=True)
class Task:
    """What a task's YAML says; every field but `rows`, `prompt` and `metrics` may be left out."""

    name: str
    rows: str
    """Glob of jsonl files, relative to the YAML's folder, or `my_pkg.mod:fn(documents)` that yields rows from held-out text."""
    prompt: str
    """Jinja template over a row's keys."""
    metrics: tuple[str, ...]
    """Names of the metric table, or `my_pkg.mod:fn`."""
    kind: str = "generate"
    """generate (the answer is text), choose (the likeliest of `choices`), embed (vectors of `prompt` and `target`)."""
    target: str = ""
    """Template of the right answer: text, or for `choose` the number of the right choice."""
    choices: str | tuple[str, ...] = ()
    """Of `choose`: templates, or the name of the row's key that holds the list."""
    tests: str = ""
    """Template of a Python program that fails unless `{{ answer }}` in it is right; or `my_pkg.mod:fn(row, answer)`."""
    group: str | None = None
    """Key of a row that names its source; rows of one source are resampled together."""
    is_chat: bool = False
    """The prompt is a user's message, rendered by the chat template."""
    max_tokens: int = 64
    """Longest answer, tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    samples: int = 1
    """Answers drawn for each row."""
    k: tuple[int, ...] | None = None
    """Of pass_at_k: the k of each pass@k beside pass@1; `None`: 5, 10 and 100, as far as there are samples."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""
    function: str | None = None
    """`my_pkg.mod:fn(row, answer)` that turns what the model wrote into the answer that is scored."""
    seconds: float = 10.0
    """Longest time of one test program."""
    memory_mb: int = 1024
    """Its address space, MiB."""
    judge: JudgeConfig | None = None
    folder: Path = field(default_factory=Path)
    """Where the YAML lies."""

    @property
    def template_digest(self) -> str:
        """Digest of all that turns a row into a prompt and an answer into a score."""
        plain = asdict(self) | {"folder": None, "rows": None}
        if self.judge is not None:
            plain["judge"] = asdict(self.judge) | {"key_variable": None}
        return digest(plain)

    @property
    def functions(self) -> tuple[str, ...]:
        """Each `module:function` that turns answers into scores."""
        named = (self.function or "", self.tests if _is_function(self.tests) else "", *self.metrics)
        return tuple(name for name in named if ":" in name)

    def settings(self) -> dict[str, Any]:
        """Itself as plain values, for `read_task`."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}


def read_task(settings: Mapping[str, Any]) -> Task:
    """The task of `Task.settings`, also once they were JSON."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    if values["judge"] is not None:
        values["judge"] = JudgeConfig(**values["judge"])
    return Task(**values)


def _is_function(name: str) -> bool:
    return re.fullmatch(r"[\w.]+:\w+", name) is not None


def find_task(name: str, field: str = "--tasks") -> Task:
    """A packaged task by its name, or one's own by the path of its YAML. Raises `ConfigError` that names `field`."""
    if name.endswith((".yaml", ".yml")):
        return load_task(Path(name), field)
    check_task(name, field)
    return load_task(packaged_tasks()[name])


def load_task(path: Path, field: str = "--tasks") -> Task:
    """The task of a YAML file. Raises `ConfigError` naming the file and the field."""
    import yaml

    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(field, f"no file {str(path)!r}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(str(path), f"is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(body, dict):
        raise ConfigError(str(path), "a task is a mapping: rows, prompt, metrics …")
    known = {item.name: item for item in fields(Task) if item.name != "folder"}
    for key in body:
        if key not in known:
            hint = nearest(str(key), known)
            raise ConfigError(
                f"{path}: {key}", "unknown field" + (f"; {hint}" if hint else f" (known: {', '.join(known)})")
            )
    for key in ("rows", "prompt", "metrics"):
        if key not in body:
            raise ConfigError(f"{path}: {key}", "is missing")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in body.items()}
    values.setdefault("name", path.stem)
    if values.get("judge") is not None:
        values["judge"] = _judge(values["judge"], path)
    task = Task(**values, folder=path.parent.resolve())
    _check(task, path)
    return task


def _judge(given: Any, path: Path) -> JudgeConfig:
    try:
        return JudgeConfig(**given)
    except TypeError as error:
        known = ", ".join(item.name for item in fields(JudgeConfig))
        raise ConfigError(f"{path}: judge", f"has {known} ({error})") from error


def _check(task: Task, path: Path) -> None:
    if task.kind not in KINDS:
        raise ConfigError(f"{path}: kind", f"{task.kind!r} is not one of {', '.join(KINDS)}")
    if isinstance(task.metrics, str) or not task.metrics:
        raise ConfigError(f"{path}: metrics", "is a list of names, at least one")
    _check_k(task, path)
    check_types(task, str(path))
    if task.judge is not None:
        check_types(task.judge, f"{path}: judge")
    for name in task.metrics:
        check_choice("metric", name, {}, f"{path}: metrics")
        _check_metric(name, task.kind, path)
    for field_, least in _LEAST.items():
        if vars(task)[field_] < least:
            raise ConfigError(f"{path}: {field_}", f"{vars(task)[field_]!r} is less than {least}")
    if task.kind == "choose" and not task.choices:
        raise ConfigError(f"{path}: choices", "is missing; a task of kind choose needs them")
    if "pass_at_k" in task.metrics and not task.tests:
        raise ConfigError(f"{path}: tests", "is missing; pass_at_k runs them")
    if task.function is not None:
        import_target(task.function, f"{path}: function")
    if _is_function(task.tests):
        import_target(task.tests, f"{path}: tests")
    if "judge" in task.metrics and task.judge is None:
        raise ConfigError(f"{path}: judge", "is missing; the metric judge asks it")
    if task.samples > 1 and task.temperature == 0:
        raise ConfigError(f"{path}: samples", f"{task.samples} greedy answers are all the same", "Set a temperature.")


def _check_metric(name: str, kind: str, path: Path) -> None:
    """Refuse a metric of the packaged ones that needs answers of another kind."""
    if ":" in name:
        return
    needed = next((each for each, names in _METRICS_OF.items() if name in names), None)
    if kind == (needed or kind) and (needed is not None or kind != "embed"):
        return
    remedy = (
        f"Of this kind there are {', '.join(_METRICS_OF[kind])}." if kind in _METRICS_OF else f"Set kind: {needed}."
    )
    wants = f"needs a task of kind {needed}" if needed else "scores written answers"
    raise ConfigError(f"{path}: metrics", f"{name} {wants}, and this one's kind is {kind}", remedy)


def _check_k(task: Task, path: Path) -> None:
    if task.k is None:
        return
    if not isinstance(task.k, tuple) or not all(type(k) is int and k > 0 for k in task.k):
        raise ConfigError(f"{path}: k", f"{task.k!r} is no list of whole numbers from 1", "For example k: [1, 5].")
    if max(task.k, default=1) > task.samples:
        raise ConfigError(f"{path}: k", f"{max(task.k)} is more than the {task.samples} samples", "Raise `samples`.")


# ---------------------------------------------------------------- rows and templates


def read_rows(task: Task, documents: Documents | None, limit: int | None) -> list[Row]:
    """The task's rows, at most `limit`, drawn by a hash of their content so that a part is a fair part.

    Raises `DataError` naming file and line for a row that is no JSON object, and where there are none.
    """
    if ":" in task.rows:
        if documents is None:
            raise DataError(f"{task.name}: its rows are made of held-out text, and there is none.")
        make: Callable[[Documents], Sequence[Row]] = import_target(task.rows, f"{task.name}.rows")
        rows = list(make(documents))
    else:
        rows = _read_jsonl(task)
    if not rows:
        raise DataError(f"{task.name}: there are no rows ({task.rows}).")
    if limit is not None and limit < len(rows):
        chosen = set(sorted(range(len(rows)), key=lambda i: _order(rows[i]))[:limit])
        rows = [row for index, row in enumerate(rows) if index in chosen]
    return rows


def _read_jsonl(task: Task) -> list[Row]:
    paths = sorted(task.folder.glob(task.rows))
    if not paths:
        raise DataError(f"{task.name}: no file matches {task.rows!r} in {task.folder}.")
    rows: list[Row] = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: is not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: is not a JSON object with keys.")
            rows.append(row)
    return rows


def _order(row: Row) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).hexdigest()


def rows_digest(rows: Sequence[Row]) -> str:
    """Digest of rows in their order."""
    hasher = hashlib.sha256()
    for row in rows:
        hasher.update(_order(row).encode())
    return hasher.hexdigest()


def render(task: Task, template: str, row: Row, **more: Any) -> str:
    """A template over a row's keys. Raises `DataError` naming the task and the missing key."""
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        return environment.from_string(template).render(**row, **more)
    except TemplateError as error:
        raise DataError(f"{task.name}: the template {template[:60]!r} fails on a row: {error}") from error


def test_program(task: Task, row: Row, answer: str) -> str:
    """The program that tells whether an answer is right."""
    if _is_function(task.tests):
        program: str = import_target(task.tests, f"{task.name}.tests")(row, answer)
        return program
    from kajiya.evals.sandbox import whole_lines

    return render(task, task.tests, row, answer=whole_lines(answer))


def choices_of(task: Task, row: Row) -> list[str]:
    """The alternatives of a row."""
    if isinstance(task.choices, str):
        if not isinstance(row.get(task.choices), list):
            raise DataError(f"{task.name}: a row has no list under {task.choices!r}.")
        return [str(choice) for choice in row[task.choices]]
    return [render(task, template, row) for template in task.choices]
