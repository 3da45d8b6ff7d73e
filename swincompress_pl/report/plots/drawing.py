"""What all plots share: one style, figures without pyplot, and a figure as PNG file, RGB array or inline SVG."""

from __future__ import annotations

import base64
import copy
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

from swincompress_pl.files import write_file

DPI = 130
_LEAST_SCALE = 0.85  # a drawing that were shrunk more would be illegible, so it scrolls
# Blue and vermilion can be told apart with every common color blindness; every pair also differs in its mark.
BASE, BETWEEN, LAST, ALERT, TEXT = "#9aa5b1", "#8db9e0", "#1f6fb2", "#c8553d", "#2b3440"
EDGE, GRID, EMPTY, PAGE = "#b8c0c8", "#e3e7eb", "#eef1f4", "#ffffff"
# A page that embeds `inline_svg` defines these, once for light and once for dark.
CSS_COLORS = {
    TEXT: "--ink", EDGE: "--edge", GRID: "--grid", EMPTY: "--empty", PAGE: "--page", LAST: "--accent", ALERT: "--alert"
}  # fmt: skip
# Heat maps: 0 has the color of something empty on the page, so the dark one gets lighter with its values.
HEAT = LinearSegmentedColormap.from_list("heat", [EMPTY, BETWEEN, LAST, "#0a2a4d"])
_HEAT_DARK = LinearSegmentedColormap.from_list("heat_dark", ["#262d35", "#23577f", "#5aa9e6", "#e6f3ff"])
_FONT = "DejaVu Sans"
_STYLE = {
    "font.family": _FONT,
    "font.size": 10,
    "text.color": TEXT,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "axes.edgecolor": EDGE,
    "axes.labelcolor": TEXT,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: small and searchable
    "svg.hashsalt": "swincompress_pl",  # equal figures give equal files
}
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


@contextmanager
def style() -> Iterator[None]:
    """Sets the style of all plots inside the context; the user's own settings come back afterwards."""
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]  # its keys are a Literal type
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of width x height inches that pyplot does not know."""
    # pyplot would keep global state and choose a backend in the user's session.
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finished(figure: Figure) -> Figure:
    """Lays the figure out and draws it once, because ticks are made at the first drawing, in the style of that time."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # keep the layout: computing it again costs as much as drawing
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    with style():
        write_file(path, lambda file: figure.savefig(file, format="png"))


def to_rgb(figure: Figure) -> npt.NDArray[np.uint8]:
    """The figure's pixels, (height, width, 3)."""
    canvas: Any = FigureCanvasAgg(figure)  # its methods have no types
    with style():
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def inline_svg(figure: Figure, *, name: str, label: str) -> str:
    """The figure as an <svg> element in the colors of an HTML page, without namespaces and outside links.

    All ids begin with `name`, which must be unique in the page. A screen reader says `label`.
    """
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for element in list(root.iter()):
        for child in [child for child in element if child.tag == f"{_SVG}metadata"]:
            element.remove(child)
    for parent in list(root.iter()):
        _add_dark_images(parent)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.attrib = {key.removeprefix(_XLINK): _local(key, value, name) for key, value in element.attrib.items()}
        if element.tag == "style" and element.text:
            element.text = _in_page_colors(element.text)
    width_pt = float(root.attrib.pop("width").removesuffix("pt"))
    root.attrib.pop("height")
    width = width_pt * 4 / 3
    style_of_root = f"width: {width:.0f}px; min-width: {_LEAST_SCALE * width:.0f}px"
    root.attrib |= {"role": "img", "aria-label": label, "style": style_of_root}
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _add_dark_images(parent: ElementTree.Element) -> None:
    """Puts behind each image in the colors of `HEAT` one for a dark page; style sheets show one of the two."""
    for place, image in reversed(list(enumerate(parent))):
        if image.tag != f"{_SVG}image":
            continue
        dark = copy.deepcopy(image)
        key = next(key for key in image.attrib if key.endswith("href"))
        dark.attrib[key] = _darkened(image.attrib[key])
        if "id" in image.attrib:
            dark.attrib["id"] += "-dark"
        image.attrib["class"], dark.attrib["class"] = "on-light", "on-dark"
        parent.insert(place + 1, dark)


def _darkened(data: str) -> str:
    """A PNG as a data URL, with each color of `HEAT` replaced by the one of a dark page."""
    head, _, coded = data.partition(",")
    with Image.open(io.BytesIO(base64.b64decode(coded))) as opened:
        pixels = np.asarray(opened.convert("RGBA")).copy()
    steps = np.linspace(0, 1, HEAT.N)
    light, dark = (np.rint(255 * colors(steps)[:, :3]).astype(np.int64) for colors in (HEAT, _HEAT_DARK))
    found, back = np.unique(pixels[..., :3].reshape(-1, 3), axis=0, return_inverse=True)
    nearest = ((found[:, None].astype(np.int64) - light) ** 2).sum(2).argmin(1)
    pixels[..., :3] = dark[nearest][back.reshape(-1)].reshape(*pixels.shape[:2], 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return f"{head},{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _local(key: str, value: str, name: str) -> str:
    """An attribute's value with ids that are unique to this figure and with colors of the page."""
    if key == "id":
        return f"{name}-{value}"
    if value.startswith("#") and key.endswith("href"):
        return f"#{name}-{value[1:]}"
    value = value.replace("url(#", f"url(#{name}-")
    return _in_page_colors(value) if key in ("style", "fill", "stroke") else value


def _in_page_colors(css: str) -> str:
    # Verdana has the widths of DejaVu Sans, for systems without it.
    css = css.replace(f"'{_FONT}'", f"'{_FONT}', Verdana, sans-serif")
    return re.sub(r"#[0-9a-f]{6}", lambda found: _page_color(found), css)


def _page_color(found: Any) -> str:
    color: str = found.group(0)
    return f"var({CSS_COLORS[color]})" if color in CSS_COLORS else color


def bars(
    ax: Axes, names: Sequence[str], values: Sequence[float], show: Callable[[float], str], colors: Sequence[str]
) -> None:
    """Draws horizontal bars from zero, the first on top, each with its value."""
    places = list(range(len(names)))
    ax.barh(places, list(values), color=list(colors), height=0.68)
    ax.set_yticks(places, list(names))
    ax.invert_yaxis()
    largest = max(values) or 1.0
    for place, value in zip(places, values, strict=True):
        ax.text(value + 0.02 * largest, place, show(value), va="center", fontsize=9)
    ax.set_xlim(0, 1.28 * largest)
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)
    ax.tick_params(axis="y", length=0)
