"""Line charts as inline SVG, and the page around them: one HTML file that opens from disk, without a network."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TypeAlias

Points: TypeAlias = "Sequence[tuple[float, float]]"  # (x, y), x rising; y may be NaN or infinite

TEMPLATES = Path(__file__).parent / "templates"
MAX_POINTS = 600  # of a line; more than a screen has room for
SMOOTH_FROM = 60  # points: below that a line is as one can read it
NUM_COLOURS = 8  # in templates/page.css; later series repeat them dashed
WIDTH, HEIGHT = 440.0, 224.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 12.0, 8.0, 32.0  # room for the axes


def line_chart(
    series: Mapping[str, Points],
    title: str,
    x_label: str = "step",
    y_label: str = "",
    *,
    log_y: bool = False,
    smooth: bool = False,
    legend: bool | None = None,
    colours: Mapping[str, int] | None = None,
    max_points: int = MAX_POINTS,
) -> str:
    """A <figure>; put it into `page`, whose script shows the values under the pointer.

    Long lines are thinned with their extremes kept; NaN and infinite values leave a gap and a cross on the axis.
    `smooth`: a long line is drawn pale under its moving average. `legend`: by default where there are several series.
    `colours` fixes the colour of a name over several charts. `log_y` needs values above 0; others become gaps.
    """
    drawn = {name: thinned(points, max_points) for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    colours = colours or {name: index for index, name in enumerate(series)}
    averages = {
        name: thinned(moving_average(points), max_points)
        for name, points in series.items()
        if smooth and len(points) >= SMOOTH_FROM
    }
    frame = _Frame.around([*drawn.values(), *averages.values()], log_y)
    parts = [_axes(frame, x_label, y_label)]
    if not drawn:
        parts.append(f'<text class="label" x="{WIDTH / 2:g}" y="{HEIGHT / 2:g}" text-anchor="middle">no values yet</text>')
    for name, points in drawn.items():
        shade = " pale" if name in averages else ""
        parts.append(_line(points, frame, f"{colour_class(colours[name])}{shade}"))
        parts.append(_crosses(points, frame, colour_class(colours[name])))
    parts += [_line(points, frame, colour_class(colours[name])) for name, points in averages.items()]
    told = escape(json.dumps(_told(drawn, averages, colours, frame), separators=(",", ":"), ensure_ascii=False), quote=True)
    caption = f"<figcaption>{escape(title)}</figcaption>"
    svg = f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(title, quote=True)}">{"".join(parts)}</svg>'
    below = legend_of(drawn, colours) if (len(series) > 1 if legend is None else legend) else ""
    return f'<figure class="chart" data-chart="{told}">{caption}{svg}{below}</figure>\n'


def legend_of(names: Iterable[str], colours: Mapping[str, int]) -> str:
    """Coloured names; a click hides that colour's lines on the whole page."""
    keys = (f'<button class="key {colour_class(colours[name])}" type="button">{escape(name)}</button>' for name in names)
    return f'<div class="legend">{"".join(keys)}</div>'


def page(title: str, body: str, *, styles: str = "", scripts: str = "") -> str:
    """The whole document; `styles` and `scripts` come after those of charts."""
    script = (TEMPLATES / "charts.js").read_text(encoding="utf-8") + scripts
    return document(title, f"{body}\n<script>\n{script}</script>", styles=styles)


def document(title: str, body: str, *, styles: str = "", head: str = "") -> str:
    """Without a script; `styles` come after those that all pages share."""
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8") + styles
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n{head}'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def colour_class(index: int) -> str:
    return f"s{index % NUM_COLOURS}" + (" dashed" if index >= NUM_COLOURS else "")


def thinned(points: Points, limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most about `limit` points: the least and the greatest of each stretch, the first, the last, all NaN's firsts."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / max(1, limit // 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        finite = [i for i in stretch if math.isfinite(points[i][1])]
        if finite:
            kept |= {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])}
        if len(finite) < len(stretch):
            kept.add(next(i for i in stretch if not math.isfinite(points[i][1])))
    return [points[i] for i in sorted(kept)]


def moving_average(points: Points) -> list[tuple[float, float]]:
    """Exponential, over about a fortieth of the line, without the pull of its start towards 0."""
    decay = 1 - 1 / max(2.0, len(points) / 40)
    total = weight = 0.0
    averaged = []
    for x, y in points:
        if math.isfinite(y):
            total, weight = decay * total + y, decay * weight + 1
            averaged.append((x, total / weight))
    return averaged


def figure(value: float) -> str:
    """A number to read: 0.35137 -> 0.3514, 0.00012 -> 1.2e-04, 1234567 -> 1,234,567."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


class _Frame:
    """From values to places in the drawing."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float], log_y: bool) -> None:
        self.x_range, self.y_range, self.log_y = x_range, y_range, log_y

    @classmethod
    def around(cls, lines: Iterable[Points], log_y: bool) -> _Frame:
        points = [point for line in lines for point in line]
        xs = [x for x, _ in points] or [0.0, 1.0]
        ys = [math.log10(y) if log_y else y for _, y in points if math.isfinite(y) and (y > 0 or not log_y)] or [0.0, 1.0]
        low, high = min(ys), max(ys)
        room = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
        x_range = (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 0.5, max(xs) + 0.5)
        return cls(x_range, (low - room if low < 0 or low - room > 0 or log_y else 0.0, high + room), log_y)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_range[0]) / (self.x_range[1] - self.x_range[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float | None:
        """None for what has no place: NaN, the infinities, 0 on a logarithmic axis."""
        if not math.isfinite(value) or (self.log_y and value <= 0):
            return None
        height = math.log10(value) if self.log_y else value
        share = (height - self.y_range[0]) / (self.y_range[1] - self.y_range[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _axes(frame: _Frame, x_label: str, y_label: str) -> str:
    parts = []
    for tick in _y_ticks(frame):
        y = frame.y(tick)
        parts.append(f'<line x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7:g}" y="{y:.1f}" dy=".32em" text-anchor="end">{short(tick)}</text>')
    for tick in ticks(*frame.x_range, 6):
        if x_label == "step" and tick != int(tick):
            continue
        x = frame.x(tick)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15:g}" text-anchor="middle">{short(tick)}</text>')
    parts.append(f'<line class="base" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{HEIGHT - BOTTOM:g}" y2="{HEIGHT - BOTTOM:g}"/>')
    parts.append(
        f'<text class="label" x="{WIDTH - RIGHT:g}" y="{HEIGHT - 3:g}" text-anchor="end">{escape(x_label)}</text>'
        f'<text class="label" x="{LEFT:g}" y="{HEIGHT - 3:g}">{escape(y_label)}</text>'
    )
    return f'<g class="axes">{"".join(parts)}</g>'


def _line(points: Points, frame: _Frame, classes: str) -> str:
    """Broken where a value has no place; a point alone is a dot, and so is each of a few."""
    strokes: list[list[str]] = [[]]
    for x, value in points:
        y = frame.y(value)
        if y is None:
            strokes.append([])
        else:
            strokes[-1].append(f"{frame.x(x):.1f} {y:.1f}")
    path = "".join("M" + "L".join(stroke) for stroke in strokes if stroke)
    few = len(points) <= 30
    dots = (place for stroke in strokes for place in stroke if few or len(stroke) == 1)
    circles = "".join('<circle class="dot {}" cx="{}" cy="{}" r="2.6"/>'.format(classes, *place.split()) for place in dots)
    return (f'<path class="line {classes}" d="{path}"/>' if path else "") + circles


def _crosses(points: Points, frame: _Frame, classes: str) -> str:
    lost = (x for x, value in points if frame.y(value) is None)
    floor = HEIGHT - BOTTOM - 5
    strokes = "".join(f"M{x - 3:.1f} {floor - 3:g}l6 6m0-6l-6 6" for x in map(frame.x, lost))
    return f'<path class="lost {classes}" d="{strokes}"/>' if strokes else ""


def _told(
    drawn: Mapping[str, Points], averages: Mapping[str, Points], colours: Mapping[str, int], frame: _Frame
) -> dict[str, object]:
    """What the page's script needs to tell the values under the pointer. A smoothed line tells its own values."""
    lines = [
        {
            "name": name, "colour": colour_class(colours[name]), "x": [_number(x) for x, _ in points],
            "y": [_number(y) for _, y in points], "at": [_rounded(frame.y(y)) for _, y in points],
        }
        for name, points in drawn.items()
    ]  # fmt: skip
    return {"x": frame.x_range, "left": LEFT, "right": WIDTH - RIGHT, "width": WIDTH, "top": TOP,
            "bottom": HEIGHT - BOTTOM, "smooth": bool(averages), "lines": lines}  # fmt: skip


def _rounded(place: float | None) -> int | None:
    return None if place is None else round(place)


def _number(value: float) -> float | int | str:
    if not math.isfinite(value):
        return str(value)
    return int(value) if value == int(value) and abs(value) < 2**53 else float(f"{value:.5g}")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values inside the range, so many or a few less."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _y_ticks(frame: _Frame) -> list[float]:
    low, high = frame.y_range
    if not frame.log_y:
        return ticks(low, high)
    whole = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
    return whole if len(whole) > 1 else [10**power for power in ticks(low, high, 4)]


def short(value: float) -> str:
    """A number for an axis: 12000 -> 12k, 0.0002 -> 2e-4."""
    if value == 0:
        return "0"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"
