"""Pairs of functions: true to the source, split by file."""

import ast
import sysconfig
import textwrap
from pathlib import Path
from typing import Any

import pytest

from kajiya.config.options import StdlibPairsSource
from kajiya.config.schema import DataConfig, SourceConfig
from kajiya.data import sources
from kajiya.data.corpus import build_corpus, is_heldout
from kajiya.data.documents import open_documents
from kajiya.data.entries import Row, Unreadable
from kajiya.data.function_pairs import INSTRUCTIONS, documented_functions, function_pairs
from kajiya.data.function_rows import FORMS, corrupted, stdlib_pairs
from kajiya.run.store import Store

STDLIB = Path(sysconfig.get_paths()["stdlib"])

SOURCE = '''\
import os

def plain(a, b=1):
    """Adds.

    Both.
    """
    # why
    return a + b

def undocumented(): return 1
def one_line(): """Words."""; return 1
def only_words():
    """Nothing follows."""

class Box:
    @property
    def value(self):
        "The value."
        return self._value

    @value.setter
    def value(self, new):
        "Sets it."
        self._value = new

    def page(self):
        """Makes a page."""
        return """
<p>
"""

    def indented(self):
        """Makes another."""
        return """
            <p>
        """

if os.name == "nt":
    async def late():
        """Later."""
        def inner():
            """Not on its own."""
            return 2
        return inner
'''


def test_each_kind_of_function() -> None:
    found = {function.qualname: function for function in documented_functions(SOURCE)}
    assert list(found) == ["plain", "Box.value@18", "Box.value@23", "Box.page", "late"]
    plain = found["plain"]
    assert plain.head == "def plain(a, b=1):\n"
    assert plain.docstring == '    """Adds.\n\n    Both.\n    """\n'
    assert plain.body == "    # why\n    return a + b\n"
    assert plain.words == "Adds.\n\nBoth."
    assert found["Box.value@23"].head == "@value.setter\ndef value(self, new):\n"
    # What would be another string at the margin is left out; what stands at the margin anyway is not.
    assert found["Box.page"].body == '    return """\n<p>\n"""\n'


def test_a_pair_is_a_prompt_and_its_answer() -> None:
    pairs = {(pair.function.qualname, pair.kind): pair for pair in function_pairs(SOURCE)}
    body, docstring = pairs["plain", "body"], pairs["plain", "docstring"]
    assert body.prompt == INSTRUCTIONS["body"] + '\n\ndef plain(a, b=1):\n    """Adds.\n\n    Both.\n    """'
    assert body.completion == "    # why\n    return a + b"
    assert docstring.prompt == INSTRUCTIONS["docstring"] + "\n\ndef plain(a, b=1):\n    # why\n    return a + b"
    assert docstring.completion == "Adds.\n\nBoth."
    longest = max(len(pair.prompt) + len(pair.completion) for pair in pairs.values())
    assert len(list(function_pairs(SOURCE, max_bytes=longest))) == len(pairs)
    assert len(list(function_pairs(SOURCE, max_bytes=longest - 1))) < len(pairs)


@pytest.mark.parametrize("module", ["textwrap.py", "json/decoder.py", "email/message.py", "argparse.py"])
def test_prompt_and_answer_together_are_the_function(module: str) -> None:
    source = (STDLIB / module).read_text()
    real = {
        ast.dump(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    pairs = list(function_pairs(source, ["body"]))
    assert pairs
    for pair in pairs:
        code = pair.prompt.removeprefix(INSTRUCTIONS["body"]).strip("\n") + "\n" + pair.completion + "\n"
        # Set back into a class at its old depth, it is the very node of the file.
        depths = (code, textwrap.indent(code, "    "))
        nested = [ast.parse(("if 1:\n" if depth else "") + text).body[0] for depth, text in enumerate(depths)]
        candidates = {ast.dump(nested[0]), ast.dump(nested[1].body[0])}
        assert candidates & real, pair.function.qualname


def test_rows_of_a_folder_and_what_is_no_python(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def broken(:\n")
    (tmp_path / "nul.py").write_text("x = 1\0")
    chat = list(stdlib_pairs(StdlibPairsSource(root=str(tmp_path))))
    unreadable = [entry for entry in chat if isinstance(entry, Unreadable)]
    assert [entry.name for entry in unreadable] == ["broken.py", "nul.py"]
    assert unreadable[0].reason.startswith("is no Python source: invalid syntax")
    rows = [entry for entry in chat if isinstance(entry, Row)]
    assert rows[0].name == "good.py:plain (body)"
    assert rows[1].name == "good.py:plain (docstring)"
    assert {row.group for row in rows} == {"good.py"}
    assert [message["role"] for message in rows[0].columns["messages"]] == ["user", "assistant"]
    plain_rows = [
        entry
        for entry in stdlib_pairs(StdlibPairsSource(root=str(tmp_path), rows="instruction"))
        if isinstance(entry, Row)
    ]
    for chat_row, row in zip(rows, plain_rows, strict=True):
        contents = [message["content"] for message in chat_row.columns["messages"]]
        assert list(row.columns.values()) == contents


def test_files_of_other_packages_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("one", "two"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "a.py").write_text('def f(x):\n    """Say x."""\n    return x\n')
    real, opened = sources._read_text, []

    def read_text(name: str, *more: Any) -> Any:
        opened.append(name)
        return real(name, *more)

    monkeypatch.setattr(sources, "_read_text", read_text)
    (row,) = stdlib_pairs(StdlibPairsSource(root=str(tmp_path), rows="seq2seq", packages="two"))
    assert isinstance(row, Row)
    assert row.group == "two/a.py"
    assert opened == ["two/a.py"]


def test_no_function_of_a_held_out_file_is_trained_on(tmp_path: Path) -> None:
    root = STDLIB / "asyncio"
    config = DataConfig(source=SourceConfig("stdlib_pairs", {"root": str(root)}), heldout_every=5, near_duplicate=None)
    corpus, _ = build_corpus(config, Store(tmp_path))
    files = {
        split: {name.partition(":")[0] for name in open_documents(corpus.path, split).names}
        for split in ("train", "heldout")
    }
    assert files["train"]
    assert files["heldout"]
    assert not files["train"] & files["heldout"]
    assert files["heldout"] == {
        path.name
        for path in root.glob("*.py")
        if is_heldout(path.name, 5) and list(function_pairs(path.read_text(), max_bytes=1200))
    }


def test_a_corrupted_body_has_the_same_parts_in_another_order() -> None:
    body = "    a = 1\n    b = 2\n    return a + b"
    mixed = corrupted(body, "x")
    assert mixed is not None
    assert mixed == corrupted(body, "x") != body
    assert sorted(mixed.split("\n")) == sorted(body.split("\n"))
    one_line = corrupted("return a + b", "x")
    assert one_line is not None
    assert sorted(one_line.split()) == ["+", "a", "b", "return"] != one_line.split()
    assert corrupted("pass", "x") is None


def test_rows_of_every_kind_from_real_functions() -> None:
    kinds = {"preference": ("chosen", "rejected"), "feedback": ("completion", "label"), "labelled": ("text", "label"),
             "seq2seq": ("input", "target")}  # fmt: skip
    assert kinds.keys() | {"chat", "instruction"} == FORMS.keys()
    for form, names in kinds.items():
        options = StdlibPairsSource(root=str(STDLIB), rows=form, packages="email json")
        rows = [row for row in stdlib_pairs(options) if isinstance(row, Row)]
        assert len(rows) > 30
        for row in rows:
            assert set(names) <= row.columns.keys()
            assert all(row.columns[name] not in ("", None) for name in names)
        labels = {row.columns["label"] for row in rows if "label" in row.columns}
        assert labels == {"feedback": {True, False}, "labelled": {"email", "json"}}.get(form, set())
