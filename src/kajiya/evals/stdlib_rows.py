"""Rows of the packaged tasks, made of held-out Python text: the next line, the arguments of a call, a body behind its docstring."""

import ast
import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

from kajiya.data.documents import Documents

_LINES_BY_DOCUMENT = 8
_CALLS_BY_DOCUMENT = 6
_CHOICES = 4
_CONTEXT_LINES = 24


def next_lines(documents: Documents) -> list[dict[str, Any]]:
    """`prompt` (the lines above), `line` (the next one, no blank and no comment), `document`."""
    rows = []
    for name, text in _texts(documents):
        lines = text.split("\n")
        fit = [i for i in range(8, len(lines)) if len(lines[i].strip()) > 3 and not lines[i].strip().startswith("#")]
        for i in sorted(_random(name).sample(fit, min(_LINES_BY_DOCUMENT, len(fit)))):
            prompt = "\n".join(lines[max(0, i - _CONTEXT_LINES) : i]) + "\n"
            rows.append({"prompt": prompt, "line": lines[i], "document": name})
    return rows


def calls(documents: Documents) -> list[dict[str, Any]]:
    """`prompt` (text up to a call's opening bracket), `choices` (arguments of calls of this document), `right`, `document`."""
    rows = []
    for name, text in _texts(documents):
        found = list(_calls(text))
        distinct = sorted({arguments for _, arguments in found})
        if len(distinct) < _CHOICES:
            continue
        draw = _random(name)
        for prompt, right in draw.sample(found, min(_CALLS_BY_DOCUMENT, len(found))):
            choices = [right, *draw.sample([each for each in distinct if each != right], _CHOICES - 1)]
            draw.shuffle(choices)
            rows.append({"prompt": prompt, "choices": choices, "right": choices.index(right), "document": name})
    return rows


def bodies(documents: Documents) -> list[dict[str, Any]]:
    """Functions whose docstring has examples that the real body passes: `prompt`, `before`, `after`, `name`, `body`, `document`."""
    rows = []
    for name, text in _texts(documents):
        lines = text.splitlines(keepends=True)
        for qualified, node in _documented(text):
            docstring, end = node.body[0], node.end_lineno or 0
            cut = docstring.end_lineno or 0
            if len(node.body) < 2 or not 1 <= end - cut <= 25 or ">>>" not in (ast.get_docstring(node) or ""):
                continue
            row = {
                "prompt": "".join(lines[max(0, node.lineno - 1 - _CONTEXT_LINES) : cut]),
                "before": "".join(lines[:cut]),
                "after": "".join(lines[end:]),
                "body": "".join(lines[cut:end]),
                "name": qualified,
                "package": name.removesuffix(".py").replace("/", ".").rpartition(".")[0],
                "document": name,
            }
            if _passes(row):
                rows.append(row)
    return rows


def cut_body(row: dict[str, Any], answer: str) -> str:
    """What the model wrote, up to the first line that stands left of the function's body."""
    indent = len(row["body"]) - len(row["body"].lstrip())
    kept = []
    for line in answer.split("\n"):
        if line.strip() and len(line) - len(line.lstrip()) < indent:
            break
        kept.append(line)
    return "\n".join(kept) + "\n"


def program(row: dict[str, Any], body: str) -> str:
    """A program that builds the module with that body, runs the function's own examples, and fails unless all are right."""
    source = row["before"] + body + row["after"]
    return _PROGRAM.format(source=source, name=row["name"], package=row["package"])


_PROGRAM = """
import doctest, sys, types
module = types.ModuleType("candidate")
module.__package__ = {package!r}
sys.modules["candidate"] = module
exec(compile({source!r}, "candidate.py", "exec"), module.__dict__)
found = module
for part in {name!r}.split("."):
    found = getattr(found, part)
runner = doctest.DocTestRunner(verbose=False)
tests = [t for t in doctest.DocTestFinder(recurse=False).find(found, {name!r}, module, module.__dict__) if t.examples]
for test in tests:
    runner.run(test, clear_globs=False)
result = runner.summarize(verbose=False)
if not tests or not result.attempted or result.failed:
    sys.exit(1)
"""


def _passes(row: dict[str, Any]) -> bool:
    from kajiya.evals.sandbox import run_program

    return run_program(program(row, row["body"]), seconds=10.0, memory_mb=1024).is_passed


def _documented(text: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods with a docstring, by qualified name."""

    def within(nodes: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for node in nodes:
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                yield f"{prefix}{node.name}", node
            elif isinstance(node, ast.ClassDef):
                yield from within(node.body, f"{prefix}{node.name}.")

    tree = _parsed(text)
    if tree is not None:
        yield from within(tree.body, "")


def _calls(text: str) -> Iterator[tuple[str, str]]:
    """Text up to the opening bracket of a call (with it), and the arguments to the closing bracket (with it)."""
    tree = _parsed(text)
    if tree is None:
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args or node.end_lineno != node.lineno:
            continue
        line = lines[node.lineno - 1].encode()
        begin, end = node.func.end_col_offset or 0, node.end_col_offset or 0
        call = line[begin:end].decode(errors="replace")
        if not call.startswith("(") or not 3 <= len(call) <= 80 or node.func.end_lineno != node.lineno:
            continue
        above = "\n".join(lines[max(0, node.lineno - 1 - _CONTEXT_LINES) : node.lineno - 1])
        yield f"{above}\n{line[:begin].decode(errors='replace')}(", call[1:]


def _parsed(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):  # held-out text may be any text; what is no Python has no functions
        return None


def _texts(documents: Documents) -> Iterator[tuple[str, str]]:
    return zip(documents.names, documents.texts(), strict=True)


def _random(name: str) -> random.Random:
    return random.Random(hashlib.sha256(name.encode()).digest())
