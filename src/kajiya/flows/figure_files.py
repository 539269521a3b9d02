"""From a drawing to SVG and PNG: text stays text, and colours stay open until light or dark is known."""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from kajiya.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Palette = Mapping[str, str]

LIGHT: Palette = {
    "ink": "#1b1f24",
    "muted": "#5f6873",
    "faint": "#dfe3e8",
    "neutral": "#a9b1bb",
    "page": "#ffffff",
    "series0": "#2f6fed",
    "series1": "#d9622b",
    "series2": "#0f8f7a",
    "series3": "#9a4fd0",
    "series4": "#b3861b",
    "series5": "#c73a6f",
}
DARK: Palette = {
    "ink": "#e8eaed",
    "muted": "#9aa4b0",
    "faint": "#343b45",
    "neutral": "#6b7582",
    "page": "#14171b",
    "series0": "#7aa8ff",
    "series1": "#ff9d66",
    "series2": "#4fd1b5",
    "series3": "#c794f5",
    "series4": "#e6bd5c",
    "series5": "#f58bb0",
}
_OPEN: Palette = {role: f"#0b{index:02x}0d" for index, role in enumerate(LIGHT)}
"""Colours that stand for their roles in the SVG until `fill_in` knows what they are to be."""

WIDE, NARROW = 860, 360
"""Widths in CSS pixels: one unit of a figure is one pixel, so that its text is as large as the page's."""
_SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_TIP = "tip-"
"""How the id of a group begins whose tip is written in hexadecimal behind it."""

Draw = Callable[["Figure", Any, Palette, bool], None]


def require_figures() -> None:
    """Raise `MissingExtraError` unless matplotlib and seaborn are installed; nothing is imported."""
    from importlib.util import find_spec

    for package in ("matplotlib", "seaborn"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "report", "The report")


# ---------------------------------------------------------------- from data to SVG and PNG


def draw_svg(name: str, draw: Draw, data: Any, *, is_narrow: bool) -> str:
    """An `<svg>` element with text kept as text and open colours: `fill_in` gives it some."""
    buffer = io.BytesIO()
    with _style(name + ("-narrow" if is_narrow else ""), _OPEN):
        figure = _figure(draw, data, _OPEN, is_narrow)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _bare_svg(buffer.getvalue().decode("utf-8"), name + ("-narrow" if is_narrow else ""))


def draw_png(draw: Draw, data: Any, palette: Palette, *, is_narrow: bool = False) -> bytes:
    """The same as PNG on the page's ground, two dots a pixel."""
    buffer = io.BytesIO()
    with _style("png", palette):
        figure = _figure(draw, data, palette, is_narrow)
        figure.savefig(buffer, format="png", dpi=144, facecolor=palette["page"])
    return buffer.getvalue()


def tip(artist: Any, text: str) -> None:
    """Have the browser say `text` over the artist, by the SVG's own means: a page needs no script for it."""
    artist.set_gid(_TIP + text.encode().hex())


def draw_points(axes: Any, points: Sequence[tuple[float, float]], texts: Sequence[str], **look: Any) -> None:
    """Points without a line, each with its tip."""
    for (x, y), text in zip(points, texts, strict=True):
        (artist,) = axes.plot([x], [y], "o", **look)
        tip(artist, text)


def _with_tips(svg: str) -> str:
    def titled(found: re.Match[str]) -> str:
        return f"<g><title>{escape(bytes.fromhex(found[1]).decode())}</title>"

    return re.sub(rf'<g id="{_TIP}([0-9a-f]*)">', titled, svg)


def fill_in(svg: str, palette: Palette) -> str:
    """The SVG with the colours of `palette` (colours, or CSS variables)."""
    for role, placeholder in _OPEN.items():
        svg = svg.replace(placeholder, palette[role])
    return svg


def css_variables() -> Palette:
    """A palette of CSS variables, for SVG within a page."""
    return {role: f"var(--{role})" for role in LIGHT}


def css_of(palette: Palette) -> str:
    """The variables' values, to stand in a CSS rule."""
    return " ".join(f"--{role}: {colour};" for role, colour in palette.items())


def standalone_svg(svg: str, palette: Palette) -> str:
    """An SVG file of its own: with a name space, a font and a size."""
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    if box is None:
        raise AssertionError("matplotlib wrote an SVG without a viewBox")
    attributes = f'xmlns="http://www.w3.org/2000/svg" width="{box[1]}" height="{box[2]}" font-family="{_SANS}" '
    return fill_in(svg, palette).replace("<svg ", "<svg " + attributes, 1) + "\n"


@contextmanager
def _style(salt: str, palette: Palette) -> Iterator[None]:
    require_figures()
    import matplotlib

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "text.parse_math": False,
        "font.size": 12.5,
        "text.color": palette["ink"],
        "axes.labelcolor": palette["muted"],
        "axes.edgecolor": palette["faint"],
        "axes.facecolor": "none",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.labelsize": 12,
        "grid.color": palette["faint"],
        "grid.linewidth": 1.0,
        "xtick.color": palette["faint"],
        "xtick.labelcolor": palette["muted"],
        "ytick.color": palette["faint"],
        "ytick.labelcolor": palette["muted"],
        "ytick.left": False,
        "xtick.labelsize": 12,
        "ytick.labelsize": 12,
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "legend.frameon": False,
        "legend.fontsize": 12,
        "lines.solid_capstyle": "round",
    }
    with matplotlib.rc_context(style):
        yield


def _figure(draw: Draw, data: Any, palette: Palette, is_narrow: bool) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=((NARROW if is_narrow else WIDE) / 72, 1), dpi=72, layout="constrained")
    draw(figure, data, palette, is_narrow)
    return figure


def _bare_svg(document: str, prefix: str) -> str:
    """Only the element: no prologue, no metadata, no name spaces, no font of its own, ids that no other figure has."""
    svg = document[document.index("<svg") :]
    svg = _with_tips(re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL))
    head, rest = svg[: svg.index(">")], svg[svg.index(">") :]
    svg = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", head) + rest.replace("xlink:href=", "href=")
    svg = re.sub(r"font: (?:[a-z]+ )?([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    return re.sub(r'href="#', f'href="#{prefix}-', svg).strip()
