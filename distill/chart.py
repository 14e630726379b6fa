"""Draw quality over cost as a Pareto chart. Knows no run and no metric: only points and what axes say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

WIDTH, HEIGHT, DPI = 1600, 1000, 160
COLOURS = {"teacher": "#0072B2", "distilled": "#D55E00", "control": "#8C8C8C", "baseline": "#009E73"}
"""From Okabe and Ito's palette, which colour-blind readers can tell apart."""
_LARGEST, _SMALLEST = 1000.0, 40.0
"""Areas of dots in matplotlib's unit (diameter²): of the largest model, and the least that is seen."""


@dataclass(frozen=True)
class Point:
    """One model."""

    label: str
    role: str
    cost: float
    """On the x axis: above 0, less is better."""
    quality: float
    spread: float | None
    """Half the width of the quality's interval."""
    bytes: int | None
    """Size of the model; None draws the smallest dot."""


def front(points: Sequence[Point], lower_is_better: bool = False) -> list[Point]:
    """Return the points that no other one beats in cost without loss of quality, cheapest first."""
    sign = -1 if lower_is_better else 1
    result: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -sign * p.quality)):
        if not result or sign * point.quality > sign * result[-1].quality:
            result.append(point)
    return result


def size_name(size: float) -> str:
    """Write bytes as a person would: ``"17 MB"``."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


def _area(size: float | None, largest: float) -> float:
    return max(_SMALLEST, _LARGEST * size / largest) if size else _SMALLEST


def _legends(figure: Figure, axes: Axes, points: Sequence[Point], largest: float) -> None:
    """Say beside the chart what colours and areas mean."""
    from matplotlib.lines import Line2D

    def dot(x: Sequence[float], y: Sequence[float], area: float, **style: Any) -> Line2D:
        return Line2D(x, y, ls="", marker="o", ms=math.sqrt(area), **style)

    roles = [role for role in COLOURS if any(p.role == role for p in points)]
    axes.legend(
        handles=[
            *(dot([], [], 64, color=COLOURS[role], label=role) for role in roles),
            Line2D([], [], color="#777777", lw=1, label="Pareto front"),
        ],
        bbox_to_anchor=(1.02, 1.0),
        loc="upper left",
        frameon=False,
        borderaxespad=0.0,
    )
    sizes = sorted(p.bytes for p in points if p.bytes)
    shown: list[int] = []  # the largest model, a middle one and the smallest, where they look different
    for size in (sizes[-1], sizes[len(sizes) // 2], sizes[0]) if sizes else ():
        if not shown or _area(size, largest) < 0.6 * _area(shown[-1], largest):
            shown.append(size)
    if shown:
        figure.text(0.82, 0.63, "Area: size on disk", fontsize=10)
    for number, size in enumerate(shown):
        y = 0.58 - 0.055 * number
        style = {"color": "none", "markeredgecolor": "#555555", "transform": figure.transFigure}
        figure.add_artist(dot([0.84], [y], _area(size, largest), **style))
        figure.text(0.87, y, size_name(size), va="center", fontsize=10)
    least = largest * _SMALLEST / _LARGEST
    if sizes and sizes[0] < least:  # areas stop being true where dots would vanish
        y = 0.58 - 0.055 * len(shown) + 0.01
        figure.text(0.82, y, f"below {size_name(least)} all alike", fontsize=8.5, color="#666666")


def _overlap(box: Bbox, others: Sequence[Bbox]) -> float:
    """Area in pixels that a box shares with others."""
    shared = 0.0
    for other in others:
        width = min(box.x1, other.x1) - max(box.x0, other.x0)
        height = min(box.y1, other.y1) - max(box.y0, other.y0)
        shared += max(0.0, width) * max(0.0, height)
    return shared


def _label(
    figure: Figure, axes: Axes, points: Sequence[Point], largest: float, steps: Sequence[tuple[float, float]]
) -> None:
    """Write each name at the nearest place around its dot where it covers no dot, bar, line or name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    canvas: Any = FigureCanvasAgg(figure)  # matplotlib's own annotations leave these two methods out
    canvas.draw()
    renderer = canvas.get_renderer()
    inside, scale = axes.get_window_extent(renderer), DPI / 72
    taken: list[Bbox] = []
    for point in points:
        x, y = axes.transData.transform((point.cost, point.quality))
        radius = math.sqrt(_area(point.bytes, largest)) / 2 * scale
        taken.append(Bbox.from_extents(x - radius, y - radius, x + radius, y + radius))
        if point.spread:
            ends = [axes.transData.transform((point.cost, point.quality + s * point.spread)) for s in (-1, 1)]
            low, high = sorted(float(end[1]) for end in ends)
            taken.append(Bbox.from_extents(x - 6, low, x + 6, high))
    for (x0, y0), (x1, y1) in pairwise(axes.transData.transform(steps)):  # the front: across, then up
        taken.append(Bbox.from_extents(x0, y0 - 2, x1, y0 + 2))
        taken.append(Bbox.from_extents(x1 - 2, min(y0, y1), x1 + 2, max(y0, y1)))
    directions = [(1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1)]
    for point in sorted(points, key=lambda p: p.cost):
        radius = math.sqrt(_area(point.bytes, largest)) / 2
        best: tuple[float, Any] | None = None
        for far, (dx, dy) in product((5, 14, 26, 40, 58), directions):
            shrink = 0.75 if dx and dy else 1.0
            text = axes.annotate(
                point.label,
                (point.cost, point.quality),
                xytext=(dx * (radius + far) * shrink, dy * (radius + far) * shrink),
                textcoords="offset points",
                parse_math=False,  # a name with $ in it is a name
                ha={1: "left", 0: "center", -1: "right"}[dx],
                va={1: "bottom", 0: "center", -1: "top"}[dy],
                fontsize=9.5,
                color="#222222",
                arrowprops={"arrowstyle": "-", "color": "#999999", "lw": 0.6, "shrinkB": radius}
                if far > 10
                else None,
            )
            box = _text_box(text, renderer)
            outside = box.width * box.height - _overlap(box, [inside])
            cost = 3 * outside + _overlap(box.padded(3), taken)
            if best is None or cost < best[0] - 1e-6:
                if best is not None:
                    best[1].remove()
                best = (cost, text)
            else:
                text.remove()
            if best[0] <= 0:
                break
        if best is not None:
            taken.append(_text_box(best[1], renderer))


def _text_box(annotation: Any, renderer: Any) -> Bbox:
    """Return the extent of an annotation's text without its leader line."""
    from matplotlib.text import Text

    annotation.update_positions(renderer)
    return Text.get_window_extent(annotation, renderer)


def draw(
    points: Sequence[Point],
    path: Path,
    *,
    title: str,
    cost_label: str,
    quality_label: str,
    lower_is_better: bool = False,
) -> None:
    """Draw a PNG of 1600 × 1000 pixels, complete or not at all.

    Args:
        points: at least one model.
        path: where the picture goes.
        title: what is compared, on what.
        cost_label: the x axis, with its unit.
        quality_label: the y axis.
        lower_is_better: turn the y axis over, so that better is always up.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    largest = float(max((p.bytes or 0 for p in points), default=0)) or 1.0
    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
    axes = figure.add_axes((0.085, 0.1, 0.715, 0.81))
    axes.set_xscale("log")
    low, high = min(p.cost for p in points), max(p.cost for p in points)
    room = max(1.35, (high / low) ** 0.14)  # names stand beside the dots at the edges
    axes.set_xlim(low / room, high * room)
    axes.autoscale(enable=True, axis="y")
    axes.grid(True, which="major", color="#E4E4E4", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for point in sorted(points, key=lambda p: -(p.bytes or 0)):  # no large dot over a small one
        colour = COLOURS.get(point.role, "#555555")
        if point.spread:
            axes.errorbar(point.cost, point.quality, point.spread, color=colour, capsize=4, lw=1.4, zorder=3)
        axes.scatter(
            point.cost, point.quality, s=_area(point.bytes, largest), color=colour, ec="white", zorder=4
        )
    axes.margins(y=0.14)
    edge = front(points, lower_is_better)
    steps = [*((p.cost, p.quality) for p in edge), (high * room, edge[-1].quality)]
    axes.plot(*zip(*steps, strict=True), drawstyle="steps-post", color="#777777", lw=1, zorder=2)
    if lower_is_better:
        axes.invert_yaxis()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if high > 4 * low else MaxNLocator(7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(cost_label, fontsize=11)
    axes.set_ylabel(quality_label, fontsize=11)
    axes.set_title(title, fontsize=13, loc="left", pad=12, parse_math=False)
    _legends(figure, axes, points, largest)
    _label(figure, axes, points, largest, steps)
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=DPI)
