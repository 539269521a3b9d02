"""The engine without a server: a file of requests, and a conversation in the terminal."""

import fcntl
import json
import os
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kajiya.data.chat import render_chat
from kajiya.errors import DataError
from kajiya.serving.batch import answer_all, read_tasks
from kajiya.serving.conversation import Conversation, converse
from kajiya.serving.sequence import SamplingParams

from .conftest import open_engine

GREEDY = SamplingParams(max_tokens=8, temperature=0)


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_is_answered_and_a_cut_run_goes_on(
    tmp_path: Path, model_folder: Path, tokenizer: Any, greedy: Callable[..., list[int]]
) -> None:
    chat = [{"role": "user", "content": "hello"}]
    rows: list[dict[str, Any]] = [{"prompt": f"def f{i}(x):", "max_tokens": 4 + i} for i in range(5)]
    rows += [{"id": "talk", "messages": chat}, {"id": "long", "prompt": "x = 1\n" * 200}]
    tasks = read_tasks(_write(tmp_path / "in.jsonl", rows), tokenizer, GREEDY, set())
    output = tmp_path / "out.jsonl"
    heard: list[tuple[int, int]] = []
    engine = open_engine(model_folder)
    assert answer_all(engine, tokenizer, tasks, output, lambda n, of: heard.append((n, of))) == 7
    assert heard[-1] == (7, 7)
    found = {row["id"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert found.keys() == {"1", "2", "3", "4", "5", "talk", "long"}
    for i in range(5):
        ids = tokenizer.encode(f"def f{i}(x):")
        assert found[str(i + 1)]["text"] == tokenizer.decode(greedy(ids, 4 + i), skip_special_tokens=True)
    ids = render_chat(tokenizer, chat, add_generation_prompt=True)
    assert found["talk"]["text"] == tokenizer.decode(greedy(ids, 8), skip_special_tokens=True)
    assert "context length" in found["long"]["error"]
    # A crash in the middle of a line: that one is answered again, the others are not.
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:3]) + lines[3][:10])
    assert answer_all(open_engine(model_folder), tokenizer, tasks, output, lambda n, of: None) == 4
    again = {row["id"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert again == found
    assert answer_all(open_engine(model_folder), tokenizer, tasks, output, lambda n, of: None) == 0


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x", "temprature": 1}, "unknown field 'temprature'"),
        ({"prompt": 5}, "prompt has the wrong type"),
        ({"prompt": "x", "messages": []}, "one of them"),
        ({"max_tokens": 3}, "one of them"),
        ({"messages": []}, "at least one message"),
        ({"prompt": "x", "model": "tuned"}, "no loaded adapter"),
        ([1], "JSON object"),
        ({"id": "1", "prompt": "x"}, "twice"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Any, row: Any, words: str) -> None:
    path = _write(tmp_path / "in.jsonl", [{"prompt": "fine"}, row])
    with pytest.raises(DataError, match=words) as caught:
        read_tasks(path, tokenizer, GREEDY, set())
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

    def answers(path: Path) -> dict[str, Any]:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({row["id"] for row in found}) == len(found)
        return {row["id"]: row for row in found}

    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    process = run(whole)
    assert "200 answered now" in process.communicate(timeout=300)[1].replace("\n", " ")
    assert answers(whole).keys() == {row["id"] for row in rows}
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
    assert answers(cut) == answers(whole)


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
