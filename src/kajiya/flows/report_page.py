"""A report as blocks, and the blocks as HTML and as Markdown: what one says, the other says."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    kind: str = "text"
    """text, number (right-aligned) or code (monospace)."""


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    block: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    block: ClassVar[str] = "text"
    text: str
    is_aside: bool = False
    """Small print."""


@dataclass(frozen=True)
class Notice:
    """Something that must not be overlooked: `bad` (red), `warn`, or `info` for what is missing."""

    block: ClassVar[str] = "notice"
    text: str
    level: str = "info"


@dataclass(frozen=True)
class Code:
    """A command or a file's content."""

    block: ClassVar[str] = "code"
    text: str
    language: str = ""


@dataclass(frozen=True)
class Tiles:
    """The few figures to remember, each with its words."""

    block: ClassVar[str] = "tiles"
    tiles: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Rows of text; `strong` rows stand out."""

    block: ClassVar[str] = "table"
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Plot:
    """A figure: SVG for wide and for narrow pages (colours as CSS variables), and its words."""

    block: ClassVar[str] = "plot"
    name: str
    wide: str
    narrow: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Sample:
    """A prompt and what different hands made of it, side by side."""

    block: ClassVar[str] = "sample"
    title: str
    prompt: str
    answers: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away until asked for."""

    block: ClassVar[str] = "details"
    summary: str
    blocks: Sequence["Block"]


Block = Heading | Text | Notice | Code | Tiles | Table | Plot | Sample | Details


@dataclass(frozen=True)
class Section:
    """A part of the report with a title of its own."""

    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    status: str
    """One of `STATUSES` of `kajiya.run.status`; mixed of several runs."""
    status_words: str
    subtitle: str
    verdict: Sequence[str]
    """One sentence a run."""
    blocks: Sequence[Block]
    """What stands above the first section."""
    sections: Sequence[Section]
    footer: str


# ---------------------------------------------------------------- HTML


def render_html(page: Page, variables: str) -> str:
    """One HTML file without anything from outside; `variables` is the CSS that gives the figures' colours."""
    html: str = html_templates().get_template("report.html.j2").render(page=page, variables=variables)
    return html


def html_templates() -> "Environment":
    """The page templates of this folder: escaping by itself, strict about names, with the filter `visible`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kajiya.flows", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    return environment


def visible(text: str) -> str:
    """Text as it can stand in a page: control characters as their pictures (␀), lone surrogates as ?."""
    return "".join(_PICTURES.get(letter, letter) for letter in text).encode("utf-8", "replace").decode("utf-8")


_PICTURES = {chr(code): chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t\r"} | {
    "\x7f": "\u2421",
    "\r": "",
}


# ---------------------------------------------------------------- Markdown


def render_markdown(page: Page, figure_paths: Mapping[str, tuple[str, str]]) -> str:
    """The same as Markdown; `figure_paths` holds each plot's file for light and for dark pages, by name."""
    head = [f"# {_plain(page.title)}", f"{_plain(page.subtitle)} · **{page.status_words}**"]
    lead = [f"**{_plain(sentence)}**" for sentence in page.verdict]
    body = [_markdown(block, figure_paths) for block in page.blocks]
    for section in page.sections:
        body.append(f"## {_plain(section.title)}")
        body.extend(_markdown(block, figure_paths) for block in section.blocks)
    return "\n\n".join([*head, *lead, *body, "---", _plain(page.footer)]) + "\n"


def _markdown(block: Block, figure_paths: Mapping[str, tuple[str, str]]) -> str:
    return _MARKDOWN[block.block](block, figure_paths)


def _notice(block: Notice, _paths: Any) -> str:
    words = {"bad": "**Attention:** ", "warn": "**Note:** ", "info": ""}[block.level]
    return "\n".join(f"> {line}" for line in (words + _plain(block.text)).split("\n"))


def _tiles(block: Tiles, _paths: Any) -> str:
    return "\n".join(f"- **{_plain(value)}** {_plain(words)}" for value, words in block.tiles)


def _table(block: Table, _paths: Any) -> str:
    rules = {"text": "---", "number": "---:", "code": "---"}
    rows = [[column.title for column in block.columns]]
    lines = [_row(_cell(title) for title in rows[0]), _row(rules[column.kind] for column in block.columns)]
    for number, row in enumerate(block.rows):
        cells = [_cell(text, column.kind == "code") for text, column in zip(row, block.columns, strict=True)]
        lines.append(_row(f"**{cell}**" if cell and number in block.strong else cell for cell in cells))
    return "\n".join(lines)


def _row(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(text: str, is_code: bool = False) -> str:
    flat = " ".join(visible(text).split())
    if is_code and flat and "`" not in flat:
        return "`" + flat.replace("|", "\\|") + "`"
    return _plain(flat).replace("|", "\\|")


def _plot(block: Plot, paths: Mapping[str, tuple[str, str]]) -> str:
    light, dark = paths[block.name]
    picture = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{_attribute(block.alt)}"></picture>'
    )
    return f"{picture}\n\n{_plain(block.caption)}"


def _sample(block: Sample, _paths: Any) -> str:
    parts = [f"**{_plain(block.title)}**", _fence(block.prompt, "")]
    for title, text in block.answers:
        parts += [f"{_plain(title)}:", _fence(text, "")]
    return "\n\n".join(parts)


def _details(block: Details, paths: Mapping[str, tuple[str, str]]) -> str:
    inner = "\n\n".join(_markdown(each, paths) for each in block.blocks)
    return f"<details><summary>{_plain(block.summary)}</summary>\n\n{inner}\n\n</details>"


def _fence(text: str, language: str) -> str:
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{visible(text).rstrip()}\n{fence}"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    shown = visible(text).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for letter in "*_`[]":
        shown = shown.replace(letter, "\\" + letter)
    return shown


def _attribute(text: str) -> str:
    return visible(text).replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


_MARKDOWN: dict[str, Callable[[Any, Mapping[str, tuple[str, str]]], str]] = {
    "heading": lambda block, _: f"### {_plain(block.text)}",
    "text": lambda block, _: _plain(block.text),
    "notice": _notice,
    "code": lambda block, _: _fence(block.text, block.language),
    "tiles": _tiles,
    "table": _table,
    "plot": _plot,
    "sample": _sample,
    "details": _details,
}
