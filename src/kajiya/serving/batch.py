"""Answers to a file of requests, offline: what the API would answer, without a server, resumable."""

import asyncio
import json
import os
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kajiya.config.digest import digest
from kajiya.config.schema import ServeConfig
from kajiya.errors import DataError, RequestError
from kajiya.run.files import hash_folder
from kajiya.serving.api import create_app
from kajiya.serving.engine import Engine, EngineError
from kajiya.serving.protocol import ChatBody, CompletionBody

_KINDS: Mapping[str, tuple[str, type[CompletionBody | ChatBody]]] = {
    "prompt": ("/v1/completions", CompletionBody),
    "messages": ("/v1/chat/completions", ChatBody),
}
"""Field that a request of a kind has → where it goes and what it may say."""
_PROBE: Mapping[str, Any] = {"prompt": [0], "max_tokens": 1, "temperature": 0}
"""A request that an engine which works can answer."""
_BUSY_S = 0.02
"""Wait before a request is sent again for which there was no room, seconds."""


@dataclass(frozen=True)
class Task:
    """One line of the file."""

    id: str
    path: str
    body: Mapping[str, Any]
    """What the API takes there."""


@dataclass(frozen=True)
class Answerer:
    """What answers: a model and its adapters."""

    name: str
    engine: Engine
    tokenizer: Any
    cfg: ServeConfig
    digest: str
    """Of the model's files."""

    def digests(self) -> dict[str, str]:
        """By name of the model or an adapter, a digest of its weights and of the settings that change what it says."""
        facts = {
            "model": self.digest,
            "runner": self.engine.runner.name,
            "device": self.engine.runner.device.type,
            "precision": self.cfg.precision,
            "quantize": self.cfg.quantize,
            "cache_precision": self.cfg.cache_precision,
            "default_max_tokens": self.cfg.default_max_tokens,
            "max_answer_tokens": self.cfg.max_answer_tokens,
        }
        found = {self.name: digest(facts)}
        for name, folder in self.engine.adapters.items():
            found[name] = digest(facts | {"adapter": hash_folder(folder)})
        return found


def read_tasks(path: Path, name: str, adapters: Collection[str], temperature: float) -> list[Task]:
    """The requests of a JSON-lines file: the fields of the API, `prompt` or `messages` among them, and an `id` if they like.

    A line that names no `model` is for the model `name`; one without a `temperature` gets the one given. Raises `DataError`
    that names the file, the line and what is wrong with it.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    tasks: list[Task] = []
    seen: set[str] = set()
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _row(where, line)
        task_id = row.pop("id", str(number))
        if not isinstance(task_id, str):
            raise DataError(f"{where}: id must be a text, not {task_id!r}")
        if task_id in seen:
            raise DataError(f"{where}: id {task_id!r} is there twice. Give each line an id of its own.")
        seen.add(task_id)
        defaults = {"model": name, "temperature": temperature}
        given = row | {field: value for field, value in defaults.items() if row.get(field) is None}
        to = _checked(where, given)
        if given["model"] != name and given["model"] not in adapters:
            raise DataError(f"{where}: model {given['model']!r} is no loaded adapter ({sorted(adapters)})")
        tasks.append(Task(task_id, to, given))
    if not tasks:
        raise DataError(f"{path}: has no requests")
    return tasks


def _row(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be a JSON object")
    return row


def _checked(where: str, body: dict[str, Any]) -> str:
    """Where the request goes, its fields being what the API takes there."""
    kinds = [kind for kind in _KINDS if kind in body]
    if len(kinds) != 1:
        raise DataError(f"{where}: give prompt or messages, one of them")
    path, model = _KINDS[kinds[0]]
    if body.get("stream"):
        raise DataError(f"{where}: stream is for a server; here an answer is written when it is whole")
    try:
        model.model_validate(body)
    except RequestError as error:
        raise DataError(f"{where}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{where}: {place}: {first['msg']}, not {repr(first['input'])[:60]}") from error
    return path


def answer_all(answerer: Answerer, tasks: list[Task], output: Path, on_answer: Callable[[int, int], None]) -> int:
    """Answer the tasks that `output` does not have yet, one JSON line each, in the order in which they end.

    A line has the task's `id` with the API's `choices` and `usage`, or the `error` with which the API would refuse it or the
    engine fails at it alone, and the digest of the `request` and of what answered it. A line cut short by a crash is dropped
    and answered again. Returns how many were answered now; `on_answer` hears how many of how many are there. Raises
    `DataError` where `output` has answers to other requests, `EngineError` where the engine fails for good.
    """
    by = answerer.digests()
    asked = {task.id: _digest(task, by) for task in tasks}
    done = _answered(output, asked)
    waiting = [task for task in tasks if task.id not in done]
    if not waiting:
        return 0
    n_new = 0
    # Half of a surrogate pair, which no encoding has, is written as JSON escapes it.
    with output.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:

        def write(task: Task, answer: dict[str, Any]) -> None:
            nonlocal n_new
            row = {"id": task.id, **answer, "request": asked[task.id]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            n_new += 1
            on_answer(len(tasks) - len(waiting) + n_new, len(tasks))

        asyncio.run(_answer(answerer, waiting, write))
    return n_new


def _digest(task: Task, by: Mapping[str, str]) -> str:
    body = {name: value for name, value in task.body.items() if name != "model"}
    return digest({"path": task.path, "body": body, "by": by[task.body["model"]]})[:16]


def _answered(output: Path, asked: Mapping[str, str]) -> set[str]:
    """The ids that `output` has answers to; what a crash has left of a line at its end is cut off."""
    if not output.exists():
        return set()
    content = output.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    done: set[str] = set()
    others: list[str] = []
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        where = f"{output}, line {number}"
        row = _row(where, line)
        if not isinstance(row.get("id"), str):
            raise DataError(f"{where}: is no answer: it has no id")
        if row["id"] in asked and row.get("request") != asked[row["id"]]:
            others.append(row["id"])
        done.add(row["id"])
    if others:
        raise DataError(
            f"{output}: {len(others)} of its answers (the first to {others[0]!r}) are to other requests: a line, the model or a "
            "setting has changed since.\nGive another --output, or remove that file."
        )
    if len(whole) < len(content):
        os.truncate(output, len(whole))
    return done


async def _answer(answerer: Answerer, waiting: list[Task], write: Callable[[Task, dict[str, Any]], None]) -> None:
    """Ask the application for every answer, as many at once as keep the engine's batch full."""
    # What protects a server from its clients is not asked of a file.
    cfg = replace(
        answerer.cfg,
        api_key=None,
        cors_origins=(),
        access_log=False,
        request_timeout_s=None,
        body_timeout_s=None,
        max_body_bytes=sys.maxsize,
    )
    app = create_app(answerer.engine, answerer.tokenizer, answerer.name, cfg)
    scheduler = answerer.engine.scheduler
    left = iter(waiting)
    failed: list[Task] = []

    async def ask() -> None:
        """Until the tasks are through, or the engine has failed one."""
        for task in left:
            try:
                write(task, await _asked(app, task.path, task.body))
            except EngineError:
                failed.append(task)
            if failed:
                return

    async with app.router.lifespan_context(app):
        n_asking = scheduler.max_batch + min(scheduler.max_batch, scheduler.max_waiting)
        while True:
            asking = [asyncio.create_task(ask()) for _ in range(n_asking)]
            try:
                await asyncio.gather(*asking)
            finally:
                for each in asking:
                    each.cancel()
                await asyncio.gather(*asking, return_exceptions=True)
            if not failed:
                return
            # One of them may have been too much for the engine, and the others failed with it.
            for task in failed:
                write(task, await _asked_alone(app, task, answerer.name))
            failed.clear()


async def _asked_alone(app: Any, task: Task, model: str) -> dict[str, Any]:
    """The answer to a task; the engine's error where that answers another request. Raises `EngineError` where it does not."""
    try:
        return await _asked(app, task.path, task.body)
    except EngineError as error:
        try:
            await _asked(app, "/v1/completions", {"model": model, **_PROBE})
        except EngineError:
            raise EngineError(
                f"{task.id}: {error}\nThe answers so far are kept; the same command goes on from there."
            ) from error
        return {"error": str(error)}


async def _asked(app: Any, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The API's answer, or the error with which it refuses the request. Raises `EngineError` where the engine fails."""
    while True:
        status, reply = await _post(app, path, body)
        if status == 200:
            return {"choices": reply["choices"], "usage": reply["usage"]}
        message = reply["error"]["message"]
        if status >= 500:
            raise EngineError(message)
        if status != 429:
            return {"error": message}
        await asyncio.sleep(_BUSY_S)


async def _post(app: Any, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
    """Status and content of the application's reply, with no network between."""
    content = [json.dumps(body).encode()]
    status = 500
    pieces: list[bytes] = []

    async def receive() -> dict[str, Any]:
        if content:
            return {"type": "http.request", "body": content.pop(), "more_body": False}
        await asyncio.Event().wait()  # nobody goes away
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        pieces.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    await app(scope, receive, send)
    return status, json.loads(b"".join(pieces))
