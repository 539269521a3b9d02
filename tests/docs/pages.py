"""The pages of the documentation as programs: their code blocks, in order, and what they say is printed.

Run as a script, `python pages.py <page.md>` executes a page's Python blocks in one namespace, in the working directory,
and prints JSON: `[{"line": …, "output": …}, …]`. Line numbers in a traceback are the page's own.
"""

import contextlib
import io
import itertools
import json
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>\S*)(?P<rest>[^\n]*)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S)
_TITLE = re.compile(r'title="([^"]*)"')
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.]*\w)")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    line: int
    """Line of its first line of content, from 1."""
    language: str
    title: str
    body: str


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order; indented ones, as in boxes, too."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        title = _TITLE.search(match["rest"])
        line = text.count("\n", 0, match.start("body")) + 1
        found.append(Block(line, match["info"], title[1] if title else "", textwrap.dedent(match["body"])))
    return found


def stated_outputs(page: Path) -> dict[int, Block]:
    """The `text` block behind each Python block that has one, by the Python block's line."""
    found = blocks(page)
    return {
        code.line: shown
        for code, shown in itertools.pairwise(found)
        if code.language == "python" and shown.language == "text" and shown.title.startswith("Output")
    }


def differences(shown: Block, real: str, tolerance: float = 0.15) -> str | None:
    """What is wrong with a stated output: a word that differs, or, where it is said to be rough, a number far off."""
    if "roughly" not in shown.title:
        return None if shown.body.strip() == real.strip() else f"stated:\n{shown.body}\nreal:\n{real}"
    stated, numbers = _NUMBER.split(shown.body.strip()), _NUMBER.findall(shown.body)
    printed, figures = _NUMBER.split(real.strip()), _NUMBER.findall(real)
    if stated != printed:
        return f"other words. stated:\n{shown.body}\nreal:\n{real}"
    far = [
        f"{number} stated, {figure} real"
        for number, figure in zip(numbers, figures, strict=True)
        if abs(float(number) - float(figure)) > tolerance * abs(float(number))
    ]
    return "; ".join(far) or None


def run_page(page: Path) -> list[dict[str, object]]:
    """Execute the page's Python blocks without a title; what each printed."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    results: list[dict[str, object]] = []
    for block in blocks(page):
        if block.language != "python" or block.title:
            continue
        # Blank lines in front, so that a traceback shows the line of the page.
        code = compile("\n" * (block.line - 1) + block.body, str(page), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        results.append({"line": block.line, "output": printed.getvalue()})
    return results


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run_page(Path(sys.argv[1]))))
