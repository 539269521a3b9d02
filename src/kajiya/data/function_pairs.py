"""Pairs for fine-tuning made from Python source: signature and docstring → body, and code → docstring."""

import ast
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BODY, DOCSTRING = "body", "docstring"
INSTRUCTIONS = {
    BODY: "Write the body of this Python function.",
    DOCSTRING: "Write the docstring of this Python function.",
}
_AnyFunction = ast.FunctionDef | ast.AsyncFunctionDef
_STRINGS = (ast.Constant, ast.JoinedStr)


@dataclass(frozen=True)
class Function:
    """A documented function, set to the left margin; `head + docstring + body` is its source."""

    qualname: str
    """Dotted name within the file; `@line` is added where the file defines it more than once."""
    head: str
    """Decorators and signature: the lines before the docstring."""
    docstring: str
    """The docstring's lines as they stand in the source, quotes included."""
    body: str
    """The lines behind the docstring."""
    words: str
    """The docstring's text, without its quotes and indentation."""


@dataclass(frozen=True)
class Pair:
    """A prompt and its answer."""

    kind: str
    """body or docstring."""
    function: Function
    prompt: str
    completion: str


def function_pairs(source: str, kinds: Sequence[str] = (BODY, DOCSTRING), max_bytes: int = 1200) -> Iterator[Pair]:
    """The pairs of one Python file, in its order; prompt and completion together have at most `max_bytes` in UTF-8.

    Raises `SyntaxError` or `ValueError` for what is no Python source.
    """
    for function in documented_functions(source):
        shown = {BODY: function.head + function.docstring, DOCSTRING: function.head + function.body}
        wanted = {BODY: function.body, DOCSTRING: function.words}
        for kind in kinds:
            prompt = f"{INSTRUCTIONS[kind]}\n\n{shown[kind]}".rstrip("\n")
            pair = Pair(kind, function, prompt, wanted[kind].rstrip("\n"))
            if len((pair.prompt + pair.completion).encode()) <= max_bytes:
                yield pair


def documented_functions(source: str) -> Iterator[Function]:
    """Functions and methods with a docstring and a body behind it; those defined within other functions are left out.

    So is one that would be another when set to the margin (its strings reach less far in than its code), or whose
    docstring shares a line with code. Raises `SyntaxError` or `ValueError` for what is no Python source.
    """
    # Python's own idea of a line end: a form feed or U+2028 is none.
    lines = source.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    found = list(_functions(ast.parse(source).body, ""))
    times = Counter(qualname for qualname, _ in found)
    for qualname, node in found:
        words = ast.get_docstring(node)
        if not words or len(node.body) < 2:
            continue
        begin = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        opens, closes, end = node.body[0].lineno - 1, node.body[0].end_lineno, node.end_lineno
        assert closes is not None
        if lines[opens][: node.body[0].col_offset].strip() or node.body[1].lineno <= closes:
            continue
        margin = " " * node.col_offset
        set_left = [line.removeprefix(margin) + "\n" for line in lines[begin:end]]
        cut, behind = opens - begin, closes - begin
        head, docstring, body = ("".join(part) for part in (set_left[:cut], set_left[cut:behind], set_left[behind:]))
        if _is_same(node, head + docstring + body):
            unique = qualname if times[qualname] == 1 else f"{qualname}@{node.lineno}"
            yield Function(unique, head, docstring, body, words)


def _functions(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, _AnyFunction]]:
    """Dotted name and node of every function of a module or class, also those under `if`, `try`, `with`."""
    for node in body:
        if isinstance(node, _AnyFunction):
            yield f"{prefix}{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{prefix}{node.name}.")
        else:
            blocks = (getattr(node, name, []) for name in ("body", "orelse", "finalbody"))
            handlers = (handler.body for handler in getattr(node, "handlers", []))
            for block in (*blocks, *handlers):
                yield from _functions(block, prefix)


def _is_same(node: _AnyFunction, text: str) -> bool:
    """Whether the text is the function, its docstring aside (which may reach less far in)."""
    strings = (part for statement in node.body[1:] for part in ast.walk(statement) if isinstance(part, _STRINGS))
    if not node.col_offset or all(part.lineno == part.end_lineno for part in strings):
        return True  # nothing but a string over several lines changes with its margin
    try:
        (moved,) = ast.parse(text).body
    except (SyntaxError, ValueError):
        return False
    return isinstance(moved, _AnyFunction) and _without_docstring(moved) == _without_docstring(node)


def _without_docstring(node: _AnyFunction) -> str:
    return " ".join(ast.dump(part) for part in (node.args, *node.decorator_list, *node.body[1:]))
