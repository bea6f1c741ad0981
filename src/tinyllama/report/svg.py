"""A picture as SVG that stands in a page and takes the page's colours.

matplotlib draws it in the colours of paper; each of them becomes a CSS variable, so that a dark page shows it in its
own. Its text stays text, in the page's font; its ids get the picture's name, since all pictures share one page.
"""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from tinyllama.report.pictures import PALETTE, SETTINGS, LegendEntry

_SETTINGS: dict[Any, Any] = {**SETTINGS, "svg.fonttype": "none", "font.size": 11, "axes.linewidth": 0.8}
_POINTS_PER_INCH = 72


def inline_svg(
    draw: Callable[[Figure], list[LegendEntry]], size: tuple[int, int], name: str, title: str
) -> tuple[Markup, list[LegendEntry]]:
    """Draw a picture of a width and a height in CSS pixels; return its SVG and its key.

    `name` is the page's for this picture and no other; `title` is what is read out for it.
    """
    written = io.StringIO()
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        width, height = (pixels / _POINTS_PER_INCH for pixels in size)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        keys = draw(figure)
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return Markup(_for_a_page(written.getvalue(), size, name, title)), keys


def _for_a_page(svg: str, size: tuple[int, int], name: str, title: str) -> str:
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = _namespace_ids(body, name)
    body = re.sub(r"<[^>]+>", _round_coordinates, body)
    for ink, colour in PALETTE.items():
        body = body.replace(colour, f"var(--{ink})")
    body = re.sub(r"font-family: [^;\"]*;?|font: (\d+px)[^;\"]*", _font, body)
    body = re.sub(r">\s+<", "><", body)
    return (
        f'<svg role="img" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" height="{size[1]}">'
        f"<title>{escape(title)}</title>{body}"
    )


def _font(found: re.Match[str]) -> str:
    """The page's font, in the picture's size."""
    return f"font-size: {found[1]}" if found[1] else ""


def _round_coordinates(tag: re.Match[str]) -> str:
    """A tag with its coordinates to a hundredth of a pixel; text between tags is not touched."""
    return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag[0])


def _namespace_ids(body: str, name: str) -> str:
    """Ids that something refers to begin with the picture's name, the others go."""
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body)
    return re.sub(r'(url\(|href=")#', rf"\1#{name}-", body)
