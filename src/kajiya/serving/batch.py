"""Answers to a file of requests, offline: the engine without a server, resumable."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kajiya.data.chat import render_chat
from kajiya.errors import DataError, RequestError
from kajiya.serving.engine import Engine
from kajiya.serving.sequence import Output, Request, SamplingParams

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "prompt": str,
    "messages": list,
    "max_tokens": int,
    "temperature": (int, float),
    "top_k": int,
    "top_p": (int, float),
    "seed": int,
    "model": str,
}


@dataclass(frozen=True)
class Task:
    """One line of the file."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    adapter: str | None


def read_tasks(path: Path, tokenizer: Any, defaults: SamplingParams, adapters: set[str]) -> list[Task]:
    """The requests of a JSON-lines file: `prompt` or `messages`, with settings of their own if they like.

    Raises `DataError` that names the file, the line and the field.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    tasks: list[Task] = []
    seen: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        task = _read(f"{path}, line {number}", str(number), line, tokenizer, defaults)
        if task.id in seen:
            raise DataError(f"{path}, line {number}: id {task.id!r} is there twice. Give each line an id of its own.")
        if task.adapter is not None and task.adapter not in adapters:
            raise DataError(f"{path}, line {number}: model {task.adapter!r} is no loaded adapter ({sorted(adapters)})")
        seen.add(task.id)
        tasks.append(task)
    if not tasks:
        raise DataError(f"{path}: has no requests")
    return tasks


def _read(where: str, number: str, line: str, tokenizer: Any, defaults: SamplingParams) -> Task:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be a JSON object")
    for key, value in row.items():
        if key not in _FIELDS:
            raise DataError(f"{where}: unknown field {key!r}. Known: {', '.join(_FIELDS)}.")
        if not isinstance(value, _FIELDS[key]) or isinstance(value, bool):
            raise DataError(f"{where}: {key} has the wrong type: {value!r}")
    if ("prompt" in row) == ("messages" in row):
        raise DataError(f"{where}: give prompt or messages, one of them")
    try:
        if "prompt" in row:
            ids = tokenizer(row["prompt"], verbose=False)["input_ids"]
        else:
            ids = render_chat(tokenizer, row["messages"], add_generation_prompt=True)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    own = {key: row[key] for key in ("max_tokens", "temperature", "top_k", "top_p", "seed") if key in row}
    return Task(row.get("id", number), tuple(ids), replace(defaults, **own), row.get("model"))


def answer_all(
    engine: Engine, tokenizer: Any, tasks: list[Task], output: Path, on_answer: Callable[[int, int], None]
) -> int:
    """Answer the tasks that `output` does not have yet, one JSON line each, in the order in which they end.

    A line cut short by a crash is dropped and answered again. Returns how many were answered now; `on_answer` hears how many of
    how many are there. A request that the engine refuses gets a line with its error.
    """
    done = _finished(output)
    waiting = [task for task in reversed(tasks) if task.id not in done]
    n_done, n_new = len(tasks) - len(waiting), 0
    answers: dict[str, list[int]] = {}
    prompts = {task.id: task for task in waiting}
    with output.open("a", encoding="utf-8") as file:

        def write(row: dict[str, Any]) -> None:
            nonlocal n_new
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            n_new += 1
            on_answer(n_done + n_new, len(tasks))

        while waiting or not engine.is_idle:
            while waiting and engine.scheduler.n_room > 0:
                task = waiting.pop()
                try:
                    engine.add(Request(task.id, task.prompt, task.params, task.adapter))
                except RequestError as error:
                    write({"id": task.id, "error": str(error)})
                else:
                    answers[task.id] = []
            for step in engine.step():
                for row in _row(step, answers, prompts, tokenizer):
                    write(row)
    return n_new


def _row(
    output: Output, answers: dict[str, list[int]], tasks: dict[str, Task], tokenizer: Any
) -> Iterator[dict[str, Any]]:
    tokens = answers[output.id]
    if output.token is not None:
        tokens.append(output.token.token)
    if output.error is not None:
        yield {"id": output.id, "error": output.error}
    elif output.finish_reason:
        yield {
            "id": output.id,
            "text": tokenizer.decode(tokens, skip_special_tokens=True),
            "finish_reason": output.finish_reason,
            "prompt_tokens": len(tasks[output.id].prompt),
            "completion_tokens": len(tokens),
        }


def _finished(output: Path) -> set[str]:
    if not output.exists():
        return set()
    kept, done = [], set()
    for line in output.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut short; it is answered again
        kept.append(line)
        done.add(row["id"])
    output.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return done
