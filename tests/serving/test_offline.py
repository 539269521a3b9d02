"""The engine without a server: a file of requests, and a conversation in the terminal."""

import fcntl
import json
import os
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from kajiya.config.schema import ServeConfig
from kajiya.data.chat import render_chat
from kajiya.errors import DataError
from kajiya.serving.api import create_app
from kajiya.serving.batch import Answerer, Task, answer_all, read_tasks
from kajiya.serving.conversation import Conversation, converse
from kajiya.serving.engine import EngineError
from kajiya.serving.rows import Rows
from kajiya.serving.sequence import SamplingParams
from kajiya.serving.text import TextStream

from .conftest import NAME, open_engine, running, save_adapter

GREEDY = SamplingParams(max_tokens=8, temperature=0)


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _read(path: Path) -> dict[str, Any]:
    """The answers by id, each of which is there once."""
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def _tasks(path: Path, rows: list[Any], adapters: Collection[str] = ()) -> list[Task]:
    return read_tasks(_write(path, rows), NAME, adapters, 0)


@pytest.fixture
def answerer(model_folder: Path, tokenizer: Any) -> Answerer:
    return Answerer(NAME, open_engine(model_folder), tokenizer, ServeConfig(default_max_tokens=8, api_key="key"), "abc")


def _text(tokenizer: Any, prompt: list[int], answer: list[int]) -> str:
    """The whole characters of an answer, as they stream."""
    stream = TextStream(tokenizer, prompt)
    return "".join(stream.push(token) for token in answer if token != tokenizer.eos_token_id)


def _quietly(n: int, of: int) -> None:
    pass


def test_a_file_is_answered_and_a_cut_run_goes_on(
    tmp_path: Path, answerer: Answerer, tokenizer: Any, greedy: Callable[..., list[int]]
) -> None:
    chat = [{"role": "user", "content": "hello"}]
    rows: list[dict[str, Any]] = [{"prompt": f"def f{i}(x):", "max_tokens": 4 + i} for i in range(5)]
    rows += [
        {"id": "talk", "messages": chat},
        {"id": "long", "prompt": "x = 1\n" * 200},
        {"id": "empty", "messages": []},
    ]
    tasks = _tasks(tmp_path / "in.jsonl", rows)
    output = tmp_path / "out.jsonl"
    heard: list[tuple[int, int]] = []
    assert answer_all(answerer, tasks, output, lambda n, of: heard.append((n, of))) == 8
    assert heard == [(n, 8) for n in range(1, 9)]
    found = _read(output)
    assert found.keys() == {"1", "2", "3", "4", "5", "talk", "long", "empty"}
    for i in range(5):
        ids = tokenizer.encode(f"def f{i}(x):")
        choice = found[str(i + 1)]["choices"][0]
        assert choice["text"] == _text(tokenizer, ids, greedy(ids, 4 + i))
        assert found[str(i + 1)]["usage"]["prompt_tokens"] == len(ids)
    ids = render_chat(tokenizer, chat, add_generation_prompt=True)
    message = found["talk"]["choices"][0]["message"]
    assert message["content"] == _text(tokenizer, ids, greedy(ids, 8))
    assert "context length" in found["long"]["error"]
    assert "messages" in found["empty"]["error"]
    # A crash in the middle of a line, of a character even: that one is answered again, the others are not.
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3]) + b'{"id": "' + "é".encode()[:1])
    kept = output.stat().st_ino
    assert answer_all(answerer, tasks, output, _quietly) == 5
    assert _read(output) == found
    # What was there has not been written anew: a kill at any moment leaves it.
    assert output.stat().st_ino == kept
    assert output.read_bytes().startswith(b"".join(lines[:3]))
    assert answer_all(answerer, tasks, output, _quietly) == 0


def test_what_other_programs_take_for_the_end_of_a_line_is_none(
    tmp_path: Path, answerer: Answerer, tokenizer: Any
) -> None:
    """U+2028, U+2029 and U+0085 stand in JSON's texts as they are, in requests and in answers."""
    odd = "\u2028\u2029\x85"
    path = tmp_path / "in.jsonl"
    rows = [{"id": odd, "prompt": f"a{odd}b"}, {"id": "half \ud800", "prompt": "x"}]
    path.write_bytes(json.dumps(rows[0], ensure_ascii=False).encode() + b"\r\n" + json.dumps(rows[1]).encode() + b"\n")
    tasks = read_tasks(path, NAME, (), 0)
    assert [task.body["prompt"] for task in tasks] == [row["prompt"] for row in rows]
    output = tmp_path / "out.jsonl"
    assert answer_all(answerer, tasks, output, _quietly) == 2
    assert odd.encode() in output.read_bytes()
    assert _read(output).keys() == {odd, "half \ud800"}
    assert answer_all(answerer, tasks, output, _quietly) == 0


def test_answers_to_other_requests_are_not_taken_for_these(
    tmp_path: Path, answerer: Answerer, model_folder: Path
) -> None:
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": "a"}, {"prompt": "b"}]
    answer_all(answerer, _tasks(path, rows), output, _quietly)
    written = output.read_bytes()
    changed = [
        (answerer, [{"prompt": "new"}, *rows]),  # the numbers of the lines name others now
        (answerer, [rows[0], rows[1] | {"max_tokens": 3}]),
        (replace(answerer, digest="def"), rows),
        (replace(answerer, cfg=replace(answerer.cfg, default_max_tokens=9)), rows),
        (replace(answerer, engine=open_engine(model_folder, runner="transformers")), rows),
    ]
    for other, given in changed:
        with pytest.raises(DataError, match=r"are to other requests.*\n.*--output"):
            answer_all(other, _tasks(path, given), output, _quietly)
        assert output.read_bytes() == written
    # What changes no answer changes nothing: more at once, a further line, another name.
    more = replace(answerer, engine=open_engine(model_folder, max_batch=2, guesses=3), name="another")
    tasks = read_tasks(_write(path, [*rows, {"prompt": "c"}]), "another", (), 0)
    assert answer_all(more, tasks, output, _quietly) == 1
    # A line that is no answer is not passed over.
    output.write_bytes(written + b"{}}\n" + written)
    with pytest.raises(DataError, match="line 3: is no JSON"):
        answer_all(answerer, _tasks(path, rows), output, _quietly)


def test_a_line_says_what_the_api_takes(tmp_path: Path, answerer: Answerer, tokenizer: Any) -> None:
    """Choices, stop strings, log-probabilities, biases, penalties, a grammar, an adapter: as over HTTP."""
    answerer.engine.load_adapter("tuned", save_adapter(tmp_path / "adapter"))
    word = tokenizer.encode("e")[0]
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    plain = {"prompt": "def wrap(text, width):", "max_tokens": 12}
    rows: list[dict[str, Any]] = [
        plain | {"id": "plain"},
        plain | {"id": "adapter", "model": "tuned"},
        plain | {"id": "choices", "n": 3, "temperature": 1.2, "seed": 1},
        plain | {"id": "scored", "logprobs": 2, "echo": True},
        plain | {"id": "biased", "logit_bias": {str(word): 100}},
        plain | {"id": "punished", "presence_penalty": 2, "frequency_penalty": 2},
        {"id": "ids", "prompt": tokenizer.encode("import os"), "max_tokens": 4},
        {"id": "form", "messages": [{"role": "user", "content": "n?"}], "max_tokens": 40, "response_format": form},
    ]
    output = tmp_path / "out.jsonl"
    answer_all(answerer, _tasks(tmp_path / "in.jsonl", rows, ["tuned"]), output, _quietly)
    whole = _read(output)["plain"]["choices"][0]["text"]
    stop = whole[3:6]
    rows.append(plain | {"id": "stopped", "stop": stop})
    answer_all(answerer, _tasks(tmp_path / "in.jsonl", rows, ["tuned"]), output, _quietly)
    found = {task: row["choices"] for task, row in _read(output).items()}
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert len({choice["text"] for choice in found["choices"]}) == 3
    assert found["scored"][0]["text"] == plain["prompt"] + whole
    assert len(found["scored"][0]["logprobs"]["top_logprobs"][-1]) >= 2
    assert found["biased"][0]["text"] == "e" * 12
    assert found["adapter"][0]["text"] != whole
    assert json.loads(found["form"][0]["message"]["content"])["n"] in (1, 2)
    assert (found["stopped"][0]["text"], found["stopped"][0]["finish_reason"]) == (
        whole[: whole.index(stop)],
        "stop",
    )
    with running(create_app(answerer.engine, tokenizer, NAME, ServeConfig())) as url:
        for row in rows:
            body = {"model": NAME, "temperature": 0} | {key: value for key, value in row.items() if key != "id"}
            kind = "chat/completions" if "messages" in row else "completions"
            reply = httpx.post(f"{url}/v1/{kind}", json=body, timeout=60).json()
            assert reply["choices"] == found[row["id"]], row["id"]


def _failing(answerer: Answerer, monkeypatch: pytest.MonkeyPatch, fails: Callable[[int, Any], bool]) -> None:
    """Have the engine fail in the steps of which `fails` says so, by their number and what is to be read."""
    run, n_steps = answerer.engine.runner.run, 0

    def failing(plan: Any) -> Any:
        nonlocal n_steps
        n_steps += 1
        if fails(n_steps, plan):
            raise RuntimeError("out of memory, say")
        return run(plan)

    monkeypatch.setattr(answerer.engine.runner, "run", failing)


def test_a_failed_engine_leaves_what_was_answered(
    tmp_path: Path, answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = _tasks(tmp_path / "in.jsonl", [{"prompt": f"a{i}", "ignore_eos": True} for i in range(30)])
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patched:
        _failing(answerer, patched, lambda n_steps, _: n_steps >= 40)
        with pytest.raises(EngineError, match=r"out of memory, say.*\n.*goes on from there"):
            answer_all(answerer, tasks, output, _quietly)
    before = _read(output)
    assert 0 < len(before) < 30
    assert all("choices" in row for row in before.values())
    assert answer_all(answerer, tasks, output, _quietly) == 30 - len(before)


def test_a_step_that_fails_once_costs_no_answer(
    tmp_path: Path, answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = _tasks(tmp_path / "in.jsonl", [{"prompt": f"a{i}", "ignore_eos": True} for i in range(30)])
    _failing(answerer, monkeypatch, lambda n_steps, _: n_steps == 40)
    assert answer_all(answerer, tasks, tmp_path / "out.jsonl", _quietly) == 30
    assert all("choices" in row for row in _read(tmp_path / "out.jsonl").values())


@pytest.mark.parametrize("is_of_all", [True, False])
def test_a_line_that_the_engine_fails_at_is_the_only_one_to_fail(
    tmp_path: Path, answerer: Answerer, monkeypatch: pytest.MonkeyPatch, is_of_all: bool
) -> None:
    """Whether its step raises, which ends all that run, or its own numbers are not finite."""
    poison = 77
    rows: list[dict[str, Any]] = [{"prompt": f"a{i}", "ignore_eos": True} for i in range(12)]
    rows[5] = {"id": "poison", "prompt": [poison]}
    if is_of_all:
        _failing(answerer, monkeypatch, lambda _, plan: any(chunk.tokens[0] == poison for chunk in plan.chunks))
        words = "out of memory, say"
    else:
        run, words = answerer.engine.runner.run, "not finite"

        def poisoned(plan: Any) -> Any:
            bad = {chunk.sequence.request.id for chunk in plan.chunks if chunk.tokens[0] == poison}
            nan = float("nan")
            return {
                name: Rows(each.logits * nan, each.best, [nan] * len(each.best)) if name in bad else each
                for name, each in run(plan).items()
            }

        monkeypatch.setattr(answerer.engine.runner, "run", poisoned)
    tasks, output = _tasks(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert answer_all(answerer, tasks, output, _quietly) == 12
    found = _read(output)
    assert words in found.pop("poison")["error"]
    assert all("choices" in row for row in found.values())
    assert answer_all(answerer, tasks, output, _quietly) == 0


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x", "temprature": 1}, "unknown parameter 'temprature'.*temperature"),
        ({"prompt": 5}, "prompt must be"),
        ({"prompt": "x", "max_tokens": "9"}, "max_tokens: .*not '9'"),
        ({"prompt": "x", "messages": []}, "one of them"),
        ({"max_tokens": 3}, "one of them"),
        ({"prompt": "x", "stream": True}, "stream"),
        ({"prompt": "x", "best_of": 2}, "best_of is not supported"),
        ({"prompt": "x", "model": "tuned"}, "no loaded adapter"),
        ({"prompt": "x", "model": ["tuned"]}, "model: .*not \\['tuned'\\]"),
        ({"prompt": "x", "id": 3}, "id must be a text"),
        ([1], "JSON object"),
        ({"id": "1", "prompt": "x"}, "twice"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        _tasks(tmp_path / "in.jsonl", [{"prompt": "fine"}, row])
    assert "line 2" in str(caught.value)


def test_a_conversation_goes_on_behind_its_turns(
    model_folder: Path, tokenizer: Any, greedy: Callable[..., list[int]]
) -> None:
    engine = open_engine(model_folder)
    conversation = Conversation(engine, tokenizer, GREEDY)
    first = "".join(conversation.ask("a"))
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "b"},
    ]
    expected = tokenizer.decode(greedy(render_chat(tokenizer, turns, True), 8), skip_special_tokens=True)
    # What is not whole at the end (half a character) is not said.
    assert expected.startswith("".join(conversation.ask("b")))
    assert engine.scheduler.n_shared_tokens > 0
    # An answer that is broken off leaves what was said, and a free engine.
    pieces = conversation.ask("c")
    begun = next(pieces)
    pieces.close()
    assert conversation.turns[-1] == {"role": "assistant", "content": begun}
    assert engine.is_idle
    conversation.reset()
    assert conversation.turns == []


def test_an_interrupt_within_a_step_leaves_an_engine_that_works(
    model_folder: Path, tokenizer: Any, greedy: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(model_folder)
    conversation = Conversation(engine, tokenizer, GREEDY)
    pool, take = engine.scheduler.pool, engine.scheduler.pool.take
    n_taken = 0

    def interrupted() -> int:
        nonlocal n_taken
        n_taken += 1
        if n_taken == 2:
            raise KeyboardInterrupt
        return take()

    with monkeypatch.context() as patch:
        patch.setattr(pool, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(conversation.ask("a question of several blocks"))
    assert engine.is_idle
    assert pool.n_free == pool.n_blocks
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]
    conversation.reset()
    ids = render_chat(tokenizer, [{"role": "user", "content": "b"}], True)
    expected = tokenizer.decode(greedy(ids, 8), skip_special_tokens=True)
    assert expected.startswith("".join(conversation.ask("b")))


def test_the_terminal_takes_questions_and_commands(model_folder: Path, tokenizer: Any) -> None:
    conversation = Conversation(open_engine(model_folder), tokenizer, GREEDY, system="Be brief.")
    lines = iter(["hello", "", "/reset", "/exit"])
    written: list[str] = []
    converse(conversation, lambda: next(lines), written.append)
    text = "".join(written)
    assert "tokens, " in text
    assert "begun anew" in text
    assert conversation.turns == [{"role": "system", "content": "Be brief."}]

    def ends() -> str:
        raise EOFError

    converse(conversation, ends, written.append)


def _command(*words: str) -> list[str]:
    return [sys.executable, "-c", "from kajiya.cli import main; main()", *words]


@pytest.mark.slow
def test_a_killed_file_of_requests_goes_on(tmp_path: Path, model_folder: Path) -> None:
    """kill -9 in the middle, the same command again: every answer there once, and what it is without the kill."""
    rows = [{"id": f"r{i}", "prompt": f"def f{i}(x):", "max_tokens": 60} for i in range(200)]
    requests = _write(tmp_path / "in.jsonl", rows)
    settings = ["--set", "serve.precision=fp32", "--set", "serve.max_batch=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "KAJIYA_STORE": str(tmp_path / "store")}

    def run(output: Path) -> "subprocess.Popen[str]":
        words = ["generate", str(requests), "--model", str(model_folder), "--output", str(output), *settings]
        return subprocess.Popen(_command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    process = run(whole)
    assert "200 answered now" in process.communicate(timeout=300)[1].replace("\n", " ")
    assert _read(whole).keys() == {row["id"] for row in rows}
    process = run(cut)
    while not cut.exists() or cut.read_bytes().count(b"\n") < 20:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.communicate()
    n_before = cut.read_bytes().count(b"\n")
    assert 20 <= n_before < 200
    process = run(cut)
    assert f"{200 - n_before} answered now" in process.communicate(timeout=300)[1].replace("\n", " ")
    assert _read(cut) == _read(whole)


@pytest.mark.slow
def test_the_terminal_by_keyboard(tmp_path: Path, model_folder: Path) -> None:
    """`kajiya chat` at a terminal: a question, Ctrl-C in the middle of an answer, a new beginning, too long a question, the end."""
    main_end, its_end = os.openpty()
    settings = ["serve.precision=fp32", "--temperature", "0", "--max-tokens", "100"]
    process = subprocess.Popen(
        _command("chat", str(model_folder), *settings),
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb", "KAJIYA_STORE": str(tmp_path / "store")},
    )
    os.close(its_end)
    heard = b""

    def until(words: bytes) -> bytes:
        nonlocal heard
        limit = time.monotonic() + 120
        while words not in heard:
            assert time.monotonic() < limit, heard
            if select.select([main_end], [], [], 1)[0]:
                heard += os.read(main_end, 1 << 16)
        before, heard = heard.split(words, 1)
        return before

    try:
        assert b"native" in until(b"/exit ends.")
        until(b"> ")
        os.write(main_end, b"Rain?\n")
        assert len(until(b" a second, first after")) > 60
        until(b"> ")
        os.write(main_end, b"/reset\n")
        until(b"(begun anew)")
        until(b"> ")
        os.write(main_end, b"what is it? " * 90 + b"\n")
        until(b"context length is 192")
        until(b"> ")
        os.write(main_end, b"Snow?\n")
        until(b"Snow?\r\n")
        while not heard.strip():  # of the answer: before it, Ctrl-C ends the chat
            heard += os.read(main_end, 1 << 16)
        # What the terminal makes of Ctrl-C.
        os.write(main_end, b"\x03")
        until(b" a second, first after")
        until(b"> ")
        os.write(main_end, b"/exit\n")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main_end)
