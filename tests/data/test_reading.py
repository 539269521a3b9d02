"""Rows of every kind from every source: detection that is said, column maps, canonical forms, and every fault."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kajiya.config.compose import compose
from kajiya.config.schema import DataConfig, HeldoutSourceConfig, SourceConfig
from kajiya.data.corpus import build_corpus
from kajiya.data.documents import open_documents
from kajiya.data.entries import Document, Unreadable
from kajiya.data.formats import FORMATS, class_names, row_text
from kajiya.data.origin import Origin
from kajiya.data.reading import open_rows
from kajiya.errors import ConfigError, DataError
from kajiya.run.store import Store

HI, HO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
SYSTEM = {"role": "system", "content": "s"}


def rows_of(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> Origin:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_rows(DataConfig(source=SourceConfig("jsonl", {"files": str(path)}), **settings))


def read(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> tuple[str, list[Any]]:
    origin = rows_of(tmp_path, *rows, **settings)
    kind = origin.form["format"]
    found = []
    for entry in origin.read():
        assert isinstance(entry, Document), entry
        found.append(entry.text if kind == "text" else json.loads(entry.text))
    return kind, found


# ---------------------------------------------------------------- columns for rewards


def test_columns_are_kept_for_rewards_under_their_own_names(tmp_path: Path) -> None:
    tests = ["assert f(1)", "assert f(2)"]
    row = {"question": "p", "tests": tests, "level": 2, "id": 7}
    kind, (found,) = read(tmp_path, row, columns={"prompt": "question"}, keep=("tests", "level"))
    assert (kind, found) == ("prompt", {"prompt": "p", "row": {"tests": tests, "level": 2}})
    kind, (found,) = read(tmp_path, {"prompt": "p", "completion": "c", "level": 2}, keep=("level",))
    assert (kind, found) == ("instruction", {"prompt": "p", "completion": "c", "row": {"level": 2}})
    assert row_text(kind, json.dumps(found)) == "p\n\nc"
    assert rows_of(tmp_path, row, columns={"prompt": "question"}, keep=("tests",)).unread == ("level", "id")


def test_a_column_that_is_to_be_kept_and_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.keep: there is no column 'test'; .*did you mean 'tests'"):
        rows_of(tmp_path, {"prompt": "p", "tests": 1}, keep=("test",))
    with pytest.raises(ConfigError, match=r"data.keep: chat rows are not judged"):
        rows_of(tmp_path, {"messages": [HI, HO], "tests": 1}, keep=("tests",))
    origin = rows_of(tmp_path, {"prompt": "p", "tests": 1}, {"prompt": "q"}, keep=("tests",))
    first, second = origin.read()
    assert isinstance(first, Document)
    assert isinstance(second, Unreadable)
    assert second.reason == "has no column 'tests' (data.keep)"


def test_a_prompt_that_ends_with_an_answer_is_refused(tmp_path: Path) -> None:
    (entry,) = rows_of(tmp_path, {"prompt": [HI, HO]}).read()
    assert isinstance(entry, Unreadable)
    assert "prompt" in entry.reason


# ---------------------------------------------------------------- accepted shapes


@pytest.mark.parametrize(
    ("row", "kind", "expected"),
    [
        ({"text": "a", "id": 1}, "text", "a"),
        ({"prompt": "p", "completion": "c"}, "instruction", {"prompt": "p", "completion": "c"}),
        ({"prompt": "p", "answer": 3}, "prompt", {"prompt": "p"}),
        ({"prompt": [HI], "system": "s"}, "prompt", {"prompt": [SYSTEM, HI]}),
        ({"prompt": json.dumps([HI, HO, HI])}, "prompt", {"prompt": [HI, HO, HI]}),
        ({"prompt": "Hi", "messages": [HI, HO]}, "chat", {"messages": [HI, HO]}),
        ({"instruction": "i", "input": "", "output": "o"}, "instruction", {"prompt": "i", "completion": "o"}),
        (
            {"instruction": "i", "input": "x", "output": "o", "system": "s"},
            "instruction",
            {"prompt": "i\n\nx", "completion": "o", "system": "s"},
        ),
        ({"prompt": [HI], "completion": [HO]}, "instruction", {"prompt": [HI], "completion": [HO]}),
        ({"messages": [HI, HO], "source": "x"}, "chat", {"messages": [HI, HO]}),
        ({"messages": json.dumps([HI, HO])}, "chat", {"messages": [HI, HO]}),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "system": "s"},
            "chat",
            {"messages": [{"role": "system", "content": "s"}, HI, HO]},
        ),
        (
            {"messages": [HI, HO | {"train": False, "name": None}]},
            "chat",
            {"messages": [HI, HO | {"weight": 0.0}]},
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                    HO,
                ]
            },
            "chat",
            {"messages": [HI, HO]},
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "score": 1},
            "preference",
            {"prompt": "p", "chosen": "a", "rejected": "b"},
        ),
        (
            {"chosen": "Q: why? A: Because.", "rejected": "Q: why? A: Believe me."},
            "preference",
            {"prompt": "Q: why? A:", "chosen": " Because.", "rejected": " Believe me."},
        ),
        (
            {"prompt": "Hi", "chosen": [HI, HO], "rejected": [HI, HO | {"content": "No"}]},
            "preference",
            {"prompt": [HI], "chosen": [HO], "rejected": [HO | {"content": "No"}]},
        ),
        (
            {"prompt": [HI], "chosen": [HO], "rejected": [HO | {"content": "No"}]},
            "preference",
            {"prompt": [HI], "chosen": [HO], "rejected": [HO | {"content": "No"}]},
        ),
        (
            {"system": "s", "prompt": "p", "chosen": "a", "rejected": "b"},
            "preference",
            {"prompt": "p", "chosen": "a", "rejected": "b", "system": "s"},
        ),
        (
            {"system": "s", "prompt": [HI], "chosen": [HO], "rejected": [HO | {"content": "No"}]},
            "preference",
            {"prompt": [SYSTEM, HI], "chosen": [HO], "rejected": [HO | {"content": "No"}]},
        ),
        (
            {"system": "s", "prompt": [HI], "completion": [HO]},
            "instruction",
            {"prompt": [SYSTEM, HI], "completion": [HO]},
        ),
        (
            {"system": "s", "prompt": "p", "completion": "c", "label": False},
            "feedback",
            {"prompt": "p", "completion": "c", "label": 0, "system": "s"},
        ),
        (
            {"prompt": "p", "completion": "c", "label": True},
            "feedback",
            {"prompt": "p", "completion": "c", "label": 1},
        ),
        ({"text": "a", "label": "good"}, "labelled", {"text": "a", "label": "good"}),
        ({"text": "a", "label": 3}, "labelled", {"text": "a", "label": 3}),
        ({"text": "a", "label": 0.5}, "labelled", {"text": "a", "label": 0.5}),
        ({"input": "a", "target": "b"}, "seq2seq", {"input": "a", "target": "b"}),
    ],
)
def test_a_row_of_each_shape(tmp_path: Path, row: dict[str, Any], kind: str, expected: Any) -> None:
    assert read(tmp_path, row) == (kind, [expected])
    assert read(tmp_path, row, format=kind) == (kind, [expected])


def test_tools_and_calls_take_one_form(tmp_path: Path) -> None:
    schema = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    call = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"x": 1}}}
    answer = {"role": "tool", "content": "2", "tool_call_id": "c1"}
    wanted = {
        "messages": [HI, {"role": "assistant", "content": None, "tool_calls": [call]}, answer, HO],
        "tools": [{"type": "function", "function": schema}],
    }
    as_text = call | {"function": {"name": "f", "arguments": '{"x": 1}'}}
    for tools in (wanted["tools"], [schema], json.dumps([schema]), [json.dumps(schema)]):
        for calls in ([call], [as_text], json.dumps([as_text])):
            messages = [HI, {"role": "assistant", "tool_calls": calls}, answer, HO]
            assert read(tmp_path, {"messages": messages, "tools": tools}) == ("chat", [wanted])
    sharegpt = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Ho"},
    ]
    (row,) = read(tmp_path, {"conversations": sharegpt, "tools": json.dumps([schema])})[1]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert row["messages"][1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]


@pytest.mark.parametrize("nothing", [None, "", "null", [], {}])
def test_nothing_is_no_tool_and_no_call(tmp_path: Path, nothing: Any) -> None:
    row = {"messages": [HI, HO | {"tool_calls": nothing}], "tools": nothing}
    assert read(tmp_path, row) == ("chat", [{"messages": [HI, HO]}])


def test_a_text_that_only_begins_as_messages_is_a_text(tmp_path: Path) -> None:
    for prompt in ('[{"role":', '[{"role":' + "[" * 100_000):
        assert read(tmp_path, {"prompt": prompt, "completion": "c"})[1] == [{"prompt": prompt, "completion": "c"}]


def test_other_names_by_a_map(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a", "text": "not this"}
    settings = {"columns": {"prompt": "question", "completion": "answer"}, "format": "instruction"}
    assert read(tmp_path, row, **settings) == ("instruction", [{"prompt": "q", "completion": "a"}])
    both = {"instruction": "a", "output": "b", "prompt": "c", "completion": "d"}
    wanted = {"completion": "completion", "prompt": "prompt"}
    assert read(tmp_path, both, columns=wanted) == ("instruction", [{"prompt": "c", "completion": "d"}])
    # A column that stands for another is not also itself.
    assert read(tmp_path, {"text": "q", "output": "a"}, columns={"prompt": "text", "completion": "output"}) == (
        "instruction",
        [{"prompt": "q", "completion": "a"}],
    )
    config = compose("stdlib-pretrain", ["+data.columns.prompt=question", "data.format=instruction"])
    assert config.data.columns == {"prompt": "question"}


# ---------------------------------------------------------------- detection


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        (
            {"text": "a", "messages": [HI, HO]},
            {},
            r"data.format: columns text, messages fit more than one kind of rows: text \(text\); chat \(messages\)\n.*chat, text",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d"}, {}, "instruction .* preference"),
        ({"messages": [], "conversations": []}, {}, r"which of them to read, .* data.columns=\{messages: messages\}\."),
        (
            {"instruction": "a", "output": "b", "prompt": "c", "completion": "d"},
            {},
            r"for example data.columns=\{completion: completion, prompt: prompt\}\.",
        ),
        ({"body": "a"}, {"format": "chat"}, r"for example data.columns.messages=body\."),
        (
            {"body": "a", "id": 1},
            {},
            r"data.columns: columns body, id make no kind of rows .*\n.*data.columns.text=body",
        ),
        ({"text": "a"}, {"format": "chat"}, r"columns text make no chat rows \(chat: messages or conversations\)"),
        ({"text": "a"}, {"columns": {"promt": "text"}}, r"data.columns.promt: is no column .* did you mean 'prompt'"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "score": 1},
            {"columns": {"label": "score"}},
            r"data.columns.label: preference rows of chosen, rejected have no such column "
            r"\(known: margin, prompt, system, tools\)\n"
            "Leave it out, or set data.format",
        ),
        (
            {"prompt": "p", "completion": "c", "more": "x"},
            {"columns": {"input": "more"}},
            r"data.columns.input: instruction rows of completion, prompt have no such column",
        ),
        (
            {"text": "a", "role": "b"},
            {"columns": {"message.role": "role"}},
            r"data.columns.message.role: text rows hold no messages\nLeave it out",
        ),
        ({"body": "a"}, {"columns": {"text": "bodi"}}, r"data.columns.text: there is no column 'bodi'; there is: body"),
    ],
)
def test_what_is_ambiguous_or_missing_is_an_error_with_columns_and_choices(
    tmp_path: Path, row: dict[str, Any], settings: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        rows_of(tmp_path, row, **settings)


def entries_of(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> list[tuple[str, str]]:
    """Each entry's type, and its text or what is wrong with it."""
    entries = rows_of(tmp_path, *rows, **settings).read()
    return [
        ("row", entry.text) if isinstance(entry, Document) else (type(entry).__name__, entry.reason)
        for entry in entries
    ]


def test_the_first_row_alone_does_not_say_what_the_rows_are(tmp_path: Path) -> None:
    text, labelled = {"text": "a"}, {"text": "b", "label": 1}
    first, *rest = entries_of(tmp_path, text, labelled, labelled)
    assert first == ("Unreadable", "has no column 'label' (it has: text)")
    assert [kind for kind, _ in rest] == ["row", "row"]
    pair, judged = {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c", "label": False}
    assert rows_of(tmp_path, pair, *[judged] * 5).form["format"] == "feedback"
    # Set, the kind is what was set, whatever the first rows hold.
    meta, chat = {"meta": "x"}, {"messages": [HI, HO]}
    first, second = entries_of(tmp_path, meta, chat, format="chat")
    assert first == ("Unreadable", "has no column 'messages' (it has: meta)")
    assert second[0] == "row"
    assert entries_of(tmp_path, labelled, text, format="text") == [("row", "b"), ("row", "a")]
    # A column that only some rows have can be mapped.
    told = chat | {"instructions": "s"}
    _, second = entries_of(tmp_path, chat, told, columns={"system": "instructions"})
    assert json.loads(second[1])["messages"] == [SYSTEM, HI, HO]


def test_a_later_row_of_another_kind_is_refused(tmp_path: Path) -> None:
    rows = [{"text": str(number)} for number in range(120)]
    assert entries_of(tmp_path, *rows, {"text": "b", "label": 1, "id": 7})[-1] == (
        "Unreadable",
        "has label, which text rows do not, but labelled rows; data.format=text reads it without",
    )
    assert entries_of(tmp_path, *rows, {"text": "b", "label": 1}, format="text")[-1] == ("row", "b")
    pairs = [{"question": "p", "completion": "c"}] * 120
    other = {"question": "p", "completion": "c", "messages": [HI, HO]}
    assert entries_of(tmp_path, *pairs, other, columns={"prompt": "question"})[-1] == (
        "Unreadable",
        "has messages, which instruction rows do not, but chat rows; data.format=instruction reads it without",
    )


def test_columns_that_are_not_read_are_said_once(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "id": number, "\ud800": 1} for number in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig("jsonl", {"files": str(path)})
    notes: list[str] = []

    def hear(kind: str, **fields: Any) -> None:
        if kind == "note":
            notes.append(fields["text"])

    store = Store(tmp_path / "store")
    for settings in ({}, {"format": "text"}):
        notes.clear()
        build_corpus(DataConfig(source=source, heldout_every=4, **settings), store, hear)
        assert "data.source: columns that are not read: id, \\ud800" in notes
    assert rows_of(tmp_path, {"prompt": "p", "completion": "c", "tools": None}).unread == ()
    assert rows_of(tmp_path, {"prompt": "p", "completion": "c", "input": "x"}).unread == ("input",)


def test_texts_have_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    source = SourceConfig("text", {"files": f"{tmp_path}/*.txt"})
    assert open_rows(DataConfig(source=source)).form == {"format": "text", "columns": {}}
    with pytest.raises(ConfigError, match="chat needs rows with columns, and this source yields texts"):
        open_rows(DataConfig(source=source, format="chat"))
    with pytest.raises(ConfigError, match=r"data.columns: is set, and this source yields texts"):
        open_rows(DataConfig(source=source, columns={"text": "body"}))


def test_what_was_detected_is_said_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}", "label": "ab"[i % 2]}) + "\n" for i in range(40)))
    said: list[tuple[str, Any]] = []
    config = DataConfig(source=SourceConfig("jsonl", {"files": str(path)}), heldout_every=4)
    corpus, _ = build_corpus(config, Store(tmp_path / "store"), lambda kind, **fields: said.append((kind, fields)))
    columns = {"label": "label", "text": "text"}
    assert ("derived", {"values": {"data.format": "labelled", "data.columns": columns}}) in said
    assert (corpus.facts["format"], corpus.facts["columns"]) == ("labelled", columns)
    assert corpus.facts["classes"] == ["a", "b"]
    assert json.loads(open_documents(corpus.path, "train").text(0))["label"] in "ab"


def test_class_names() -> None:
    assert class_names(["b", "a", "b"]) == ["a", "b"]
    assert class_names([10, 9, 2]) == ["2", "9", "10"]
    assert class_names([1, 0.5]) is None
    with pytest.raises(DataError, match="texts and numbers are mixed under 'label'"):
        class_names(["a", 1])


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [HO]}, "a message of the assistant at the head (messages[0]); user and assistant take turns"),
        ({"messages": [HI, HI]}, "a message of the user behind one of the user (messages[1])"),
        ({"messages": [HI, HO, HO]}, "a message of the assistant behind one of the assistant (messages[2])"),
        ({"messages": [HI, {"role": "system", "content": "s"}]}, "a message of the system behind one of the user"),
        ({"messages": [{"role": "system", "content": "s"}]}, "has nothing but a system message"),
        ({"messages": [HI, HO, {"role": "tool", "content": "x"}]}, "a tool's answer that no tool call stands before"),
        ({"messages": []}, "holds no message under 'messages'"),
        ({"messages": [HI, HO | {"content": " "}]}, "is empty under 'messages[1].content'"),
        ({"messages": [HI | {"content": ""}, HO]}, "is empty under 'messages[0].content'"),
        ({"messages": [HI | {"content": 5}, HO]}, "holds a value of type int under 'messages[0].content', not text"),
        ({"messages": [HI | {"content": None}, HO]}, "holds nothing (null) under 'messages[0].content', not text"),
        (
            {"messages": [HI | {"content": "\ud800"}, HO]},
            "holds a lone surrogate (\\ud800) under 'messages[0].content'",
        ),
        ({"messages": [HI | {"role": "bot"}, HO]}, "has the role 'bot' in messages[0], which is none of"),
        ({"messages": [HI | {"contents": "x"}, HO]}, "has an unknown key 'contents' in messages[0]"),
        ({"messages": [HI, HO | {"weight": -1}]}, "has weight=-1 in messages[1]"),
        ({"messages": [HI, HO | {"weight": 1, "train": True}]}, "has both weight and train in messages[1]"),
        ({"messages": [HI, HO | {"train": "yes"}]}, "has train='yes' in messages[1]"),
        ({"messages": "[{"}, "holds a text under 'messages' that is no JSON"),
        ({"messages": {"role": "user"}}, "holds a dict under 'messages', not a list of objects"),
        ({"messages": [HI, {"role": "assistant", "tool_calls": [{"name": 1}]}]}, "holds no tool call under"),
        ({"messages": [HI, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "is no JSON"),
        (
            {"messages": [HI | {"content": [{"type": "image"}]}, HO]},
            "something else than text under 'messages[0].content[0]'",
        ),
        (
            {"messages": [{"role": "system", "content": "a"}, HI, HO], "system": "b"},
            "has a system message under 'system' and",
        ),
        (
            {"prompt": [SYSTEM, HI], "chosen": [HO], "rejected": [HO | {"content": "No"}], "system": "b"},
            "has a system message under 'system' and at the head of its messages",
        ),
        ({"messages": [HI | {"role": ["user"]}, HO]}, "has the role ['user'] in messages[0], which is none of"),
        ({"messages": [HI | {"role": {"a": "b"}}, HO]}, "has the role {'a': 'b'} in messages[0], which is none of"),
        ({"messages": [HI, HO | {"tool_calls": 5}]}, "holds a int under 'messages[1].tool_calls', not a list"),
        ({"messages": [HI, HO | {"tool_calls": True}]}, "holds a bool under 'messages[1].tool_calls', not a list"),
        ({"messages": [HI, HO | {"tool_calls": "5"}]}, "holds a int under 'messages[1].tool_calls', not a list"),
        ({"messages": [HI, HO | {"tool_calls": {"name": "f"}}]}, "holds a dict under 'messages[1].tool_calls', not a"),
        ({"messages": [HI, HO | {"tool_calls": [3]}]}, "holds no tool call under 'messages[1].tool_calls[0]'"),
        ({"messages": [HI, HO | {"name": {}}]}, "holds a value of type dict under 'messages[1].name', not text"),
        ({"messages": [HI, HO | {"role": "function_call", "content": None}]}, "holds no tool call under"),
        ({"messages": [HI, HO | {"reasoning": 5}]}, "a value of type int under 'messages[1].reasoning_content'"),
        ({"messages": [HI, HO | {"weight": "1"}]}, "has weight='1' in messages[1], which is no number"),
        ({"messages": [HI, HO | {"weight": 10**400}]}, "in messages[1], which is no number"),
        ({"messages": [HI, HO], "tools": 5}, "holds a int under 'tools', not a list"),
        ({"messages": [HI, HO], "tools": True}, "holds a bool under 'tools', not a list"),
        ({"messages": [HI, HO], "tools": "5"}, "holds a int under 'tools', not a list"),
        ({"messages": [HI, HO], "tools": {"name": "f"}}, "holds a dict under 'tools', not a list"),
        ({"messages": [HI, HO], "tools": [5]}, "holds a int under 'tools[0]', not the description of a tool"),
        ({"messages": [HI, HO], "tools": [{"function": 3}]}, "holds a int under 'tools[0].function', not the"),
        ({"prompt": "p"}, "has no column 'completion' (it has: prompt)"),
        ({"prompt": "p", "completion": ""}, "is empty under 'completion'"),
        ({"prompt": "p", "completion": ["x"]}, "not a list of objects"),
        ({"prompt": [HI], "completion": [HI]}, "of the user behind one of the user"),
        ({"chosen": "same", "rejected": "same"}, "has no prompt: neither a column 'prompt'"),
        ({"prompt": "p", "chosen": "same", "rejected": "same"}, "has the same answer under 'chosen' and 'rejected'"),
        ({"chosen": "Yes it is", "rejected": "No it is not"}, "has no prompt: neither a column 'prompt'"),
        ({"chosen": [HI, HO], "rejected": "x"}, "holds messages under one of 'chosen' and 'rejected'"),
        ({"prompt": "Ha", "chosen": [HI, HO], "rejected": [HI, HO | {"content": "No"}]}, "is not what 'chosen' and"),
        ({"prompt": "p", "completion": "c", "label": 2}, "has label=2, which is neither true nor false"),
        ({"text": "t", "label": None}, "holds nothing under 'label', not a class or a number"),
        ({"text": "t", "label": [1]}, "holds list under 'label'"),
        ({"input": "a", "target": None}, "holds nothing (null) under 'target'"),
    ],
)
def test_a_faulty_row_is_named_with_what_is_wrong(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    good: dict[str, dict[str, Any]] = {
        "messages": {"messages": [HI, HO]},
        "completion": {"prompt": "p", "completion": "c"},
        "chosen": {"prompt": "p", "chosen": "a", "rejected": "b"},
        "label": {"text": "t", "label": 1},
        "input": {"input": "a", "target": "b"},
    }
    good["label"] = good["label"] if "text" in row else {"prompt": "p", "completion": "c", "label": 1}
    key = next((key for key in ("label", "messages", "chosen", "input", "completion") if key in row), "completion")
    # The first row says what the rows are.
    origin = rows_of(tmp_path, good[key], row)
    first, second = origin.read()
    assert isinstance(first, Document)
    assert isinstance(second, Unreadable)
    assert second.name == "rows.jsonl:2"
    assert reason in second.reason


def test_a_row_of_any_depth_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for depth in (*range(900, 1010), 100_000):
        deep = '{"parameters":' * depth + "{}" + "}" * depth
        row = json.dumps({"messages": [HI, HO], "tools": 0}).replace("0}", f"[{deep}]}}")
        path.write_text(json.dumps({"messages": [HI, HO]}) + f"\n{row}\n")
        _, second = open_rows(DataConfig(source=SourceConfig("jsonl", {"files": str(path)}))).read()
        assert isinstance(second, Document) or "nested too deeply" in second.reason or "recursion" in second.reason
    assert isinstance(second, Unreadable)


def test_a_line_that_is_too_long_is_refused_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' + '{"text": "' + "x" * 5000 + '"}\n' + '{"text": "b"}')
    options = {"files": str(path), "max_row_bytes": 2048}
    entries = list(open_rows(DataConfig(source=SourceConfig("jsonl", options))).read())
    assert [entry.name for entry in entries] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]
    assert isinstance(entries[1], Unreadable)
    assert entries[1].reason == "is a line of 5013 bytes, longer than data.source.options.max_row_bytes=2048"


# ---------------------------------------------------------------- sources


def test_the_same_conversations_from_every_source(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"messages": [HI, HO | {"content": f"Ho {i}"}], "n": i} for i in range(5)]
    rows[3]["messages"][1]["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    table = pa.Table.from_pylist(rows)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with (tmp_path / "a.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerows([["messages", "n"], *([json.dumps(row["messages"]), row["n"]] for row in rows)])
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "dict")
    sources = {
        "jsonl": {"files": f"{tmp_path}/a.jsonl"},
        "parquet": {"files": f"{tmp_path}/a.parquet"},
        "arrow": {"files": f"{tmp_path}/*.arrow"},
        "csv": {"files": f"{tmp_path}/a.csv"},
        "hub": {"path": str(tmp_path / "saved")},
    }
    found = {}
    for name, options in sources.items():
        origin = open_rows(DataConfig(source=SourceConfig(name, options)))
        assert origin.form == {"format": "chat", "columns": {"messages": "messages"}}
        found[name] = [entry.text for entry in origin.read() if isinstance(entry, Document)]
    found["dict"] = [
        entry.text
        for entry in open_rows(DataConfig(source=SourceConfig("hub", {"path": str(tmp_path / "dict")}))).read()
        if isinstance(entry, Document)
    ]
    wanted = found["jsonl"]
    assert len(wanted) == 5
    assert json.loads(wanted[3])["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert found.pop("arrow") == wanted * 2
    assert all(texts == wanted for texts in found.values())


def test_labels_of_csv_are_numbers_and_those_of_datasets_have_names(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "a.csv").write_text("text,label\nx,1\ny,2.5\nz,nan\n")
    origin = open_rows(DataConfig(source=SourceConfig("csv", {"files": f"{tmp_path}/a.csv"})))
    entries = list(origin.read())
    assert [json.loads(entry.text)["label"] for entry in entries if isinstance(entry, Document)] == [1, 2.5]
    assert isinstance(entries[2], Unreadable)
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features).save_to_disk(
        tmp_path / "saved"
    )
    origin = open_rows(DataConfig(source=SourceConfig("hub", {"path": str(tmp_path / "saved")})))
    assert [json.loads(entry.text)["label"] for entry in origin.read() if isinstance(entry, Document)] == [
        "good",
        "bad",
    ]


def test_a_label_of_csv_is_a_number_where_it_is_written_as_one(tmp_path: Path) -> None:
    labels = ["01", "1", "1_0", " 2", "+3", "-4", "0.5", "1e3", "0x1", "1.50"]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"x,{label}\n" for label in labels))
    origin = open_rows(DataConfig(source=SourceConfig("csv", {"files": f"{tmp_path}/a.csv"})))
    found = [json.loads(entry.text)["label"] for entry in origin.read() if isinstance(entry, Document)]
    assert found == ["01", 1, "1_0", " 2", "+3", -4, 0.5, 1000.0, "0x1", 1.5]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,id,text\nx,1,y\nz,2,w\n")
    origin = open_rows(DataConfig(source=SourceConfig("csv", {"files": f"{tmp_path}/a.csv"})))
    assert [(entry.name, entry.reason) for entry in origin.read() if isinstance(entry, Unreadable)] == [
        ("a.csv", "has two columns of the name 'text'; name each of them otherwise")
    ]


def test_a_key_that_stands_twice_in_a_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    inner = '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'
    path.write_text('{"text": "a"}\n{"text": "a", "text": "b"}\n' + inner + "\n")
    _, *entries = open_rows(DataConfig(source=SourceConfig("jsonl", {"files": str(path)}), format="text")).read()
    assert [entry.reason for entry in entries] == ["has the key 'text' twice", "has the key 'content' twice"]
    tools = '[{"name": "f", "name": "g"}]'
    assert entries_of(tmp_path, {"messages": [HI, HO], "tools": tools}) == [
        ("Unreadable", "has the key 'name' twice under 'tools'")
    ]


def test_an_arrow_file_that_is_none_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(b"nothing of the kind")
    (tmp_path / "b.arrow").write_bytes(b"")
    origin = open_rows(DataConfig(source=SourceConfig("arrow", {"files": f"{tmp_path}/*.arrow"})))
    reasons = [entry.reason for entry in origin.read() if isinstance(entry, Unreadable)]
    assert len(reasons) == 2
    assert all("is no arrow file" in reason for reason in reasons)


def test_the_text_of_a_row() -> None:
    chat = json.dumps({"messages": [HI, HO | {"reasoning_content": "hm"}], "tools": [{"name": "f"}]})
    assert row_text("chat", chat) == 'Hi\n\nhm\nHo\n\n[{"name": "f"}]'
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert row_text("preference", json.dumps(pair)) == "p\n\na\n\nb"
    assert row_text("text", "{}") == "{}"
    assert set(FORMATS) == {"text", "prompt", "instruction", "chat", "preference", "feedback", "labelled", "seq2seq"}


# ---------------------------------------------------------------- keys of messages

OTHER = [
    {"speaker": "human", "text": "Hi", "language": "en", "toxic": False},
    {"speaker": "gpt", "text": "Ho", "language": "en", "toxic": True},
]


def test_keys_of_messages_are_named_and_all_others_left_out(tmp_path: Path) -> None:
    columns = {"messages": "turns", "message.role": "speaker", "message.content": "text"}
    (tmp_path / "a.jsonl").write_text(json.dumps({"turns": OTHER, "tools": None}) + "\n")
    config = DataConfig(source=SourceConfig("jsonl", {"files": f"{tmp_path}/a.jsonl"}), columns=columns)
    (entry,) = open_rows(config).read()
    assert isinstance(entry, Document)
    assert json.loads(entry.text) == {"messages": [HI, HO]}


def test_an_unknown_key_of_a_message_is_named_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [HI | {"language": "en"}, HO]}) + "\n")
    config = DataConfig(source=SourceConfig("jsonl", {"files": f"{tmp_path}/a.jsonl"}))
    (entry,) = open_rows(config).read()
    assert isinstance(entry, Unreadable)
    assert "unknown key 'language' in messages[0]" in entry.reason
    assert "data.columns={message.role: role, message.content: content}" in entry.reason
    with pytest.raises(ConfigError, match=r"data.columns.message.rol: is no column .*did you mean 'message.role'"):
        open_rows(replace(config, columns={"message.rol": "role"}))


def test_keys_of_messages_that_are_json_text(tmp_path: Path) -> None:
    """As in CSV, where all is text, and bytes where it is not ASCII."""
    turns = [{"speaker": "human", "said": "Grüße"}, {"speaker": "gpt", "said": "Ho", "id": 1}]
    wanted = [{"role": "user", "content": "Grüße"}, HO]
    keys = {"message.role": "speaker", "message.content": "said"}
    for names, parts in ((["messages"], [turns]), (["prompt", "completion"], [turns[:1], turns[1:]])):
        with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as handle:
            csv.writer(handle).writerows([names, [json.dumps(part, ensure_ascii=False) for part in parts]])
        config = DataConfig(source=SourceConfig("csv", {"files": f"{tmp_path}/a.csv"}), columns=keys)
        (entry,) = open_rows(config).read()
        assert isinstance(entry, Document), entry
        assert [message for part in json.loads(entry.text).values() for message in part] == wanted
    umlaut = [json.dumps([turn | {"content": "ü"}], ensure_ascii=False) for turn in (HI, HO)]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([["prompt", "completion"], umlaut])
    (entry,) = open_rows(replace(config, columns={})).read()
    assert json.loads(entry.text) == {"prompt": json.loads(umlaut[0]), "completion": json.loads(umlaut[1])}
    # A text is no conversation for beginning as one.
    row = {"prompt": '[{"a": 1}]', "completion": "[{"}
    assert read(tmp_path, row, columns=keys) == ("instruction", [row])


def test_keys_of_messages_can_be_written_on_the_command_line() -> None:
    wanted = ["data.columns={messages: turns, message.role: speaker, message.content: text}"]
    assert compose("stdlib-sft", wanted).data.columns["message.content"] == "text"


def test_a_heldout_source_has_a_column_map_of_its_own(tmp_path: Path) -> None:
    rows = {"train": ("question", "answer"), "held": ("q", "a")}
    for name, (prompt, completion) in rows.items():
        lines = [json.dumps({prompt: f"{name} Q{i}", completion: f"{name} A{i}"}) + "\n" for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    config = DataConfig(
        source=SourceConfig("jsonl", {"files": f"{tmp_path}/train.jsonl"}),
        columns={"prompt": "question", "completion": "answer"},
        heldout_source=HeldoutSourceConfig(
            "jsonl", {"files": f"{tmp_path}/held.jsonl"}, columns={"prompt": "q", "completion": "a"}
        ),
    )
    said: list[tuple[str, dict[str, Any]]] = []
    corpus, _ = build_corpus(config, Store(tmp_path / "s"), lambda kind, **fields: said.append((kind, fields)))
    assert corpus.facts["ledger"]["heldout"]["documents"] == 20
    (found,) = (fields["values"] for kind, fields in said if kind == "derived")
    assert found["data.heldout_source.columns"] == {"completion": "a", "prompt": "q"}
    bare = replace(config, heldout_source=replace(config.heldout_source, columns={}))
    with pytest.raises(ConfigError, match=r"data.heldout_source.columns.prompt: there is no column 'question'"):
        build_corpus(bare, Store(tmp_path / "s"))
