"""Charts as inline SVG: lines, histograms and intervals. Every mark's values are in the page, for hover and keyboard.

Colours are CSS variables, so that one drawing serves light and dark pages. Text is escaped by Markup.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 380, 215
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 14, 40


@dataclass(frozen=True)
class Axis:
    """A linear scale with round ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float, start: float, end: float) -> float:
        """Where `value` lies between the pixels `start` (low) and `end` (high)."""
        return start + (value - self.low) / (self.high - self.low) * (end - start)


@dataclass(frozen=True)
class Interval:
    """A named value with its bounds."""

    name: str
    value: float
    low: float
    high: float


def axis(values: Sequence[float], count: int = 5, zero: bool = False) -> Axis:
    """A scale that holds `values` with about `count` round ticks. zero: let it begin, or end, at 0."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-9):
        margin = abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    step = _round_step((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(index * step for index in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def line(points: Sequence[tuple[float, float]], title: str, x_label: str, y_label: str, zero: bool = False) -> Markup:
    """One line. points: at least one (x, y), x rising. With one point, a dot."""
    xs, ys = axis([x for x, _ in points], 6), axis([y for _, y in points], 4, zero)
    if len(points) > 1:
        xs = Axis(points[0][0], points[-1][0], tuple(t for t in xs.ticks if points[0][0] <= t <= points[-1][0]))
    placed = [_place(xs, ys, x, y) for x, y in points]
    path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in placed)
    marks = [
        [round(px, 1), round(py, 1), f"{x_label} {number(x)}", f"{y_label} {number(y)}"]
        for (px, py), (x, y) in zip(placed, points, strict=True)
    ]
    body = _zero_line(ys) + Markup('<path class="line" d="{}"/>').format(path)
    last = placed[-1]
    body += Markup('<circle class="end" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(*last)
    summary = (
        f"{title}: from {number(points[0][1])} at {x_label} {number(points[0][0])} to {number(points[-1][1])} at "
        f"{x_label} {number(points[-1][0])}; lowest {number(min(y for _, y in points))}, "
        f"highest {number(max(y for _, y in points))}"
    )
    return _chart(title, summary, _axes(xs, ys, x_label, y_label) + body, marks)


def histogram(
    before: Sequence[float], after: Sequence[float], names: tuple[str, str], title: str, x_label: str, bins: int = 16
) -> Markup:
    """Two distributions over the same bins, drawn over each other."""
    xs = axis([*before, *after], 5)
    width = (xs.high - xs.low) / bins
    counts = [[0] * bins for _ in names]
    for row, values in zip(counts, (before, after), strict=True):
        for value in values:
            row[min(int((value - xs.low) / width), bins - 1)] += 1
    ys = axis([0, *counts[0], *counts[1]], 4, zero=True)
    ys = Axis(ys.low, ys.high, tuple(tick for tick in ys.ticks if tick == int(tick)))
    body, marks = Markup(""), []
    for kind, row in zip(("before", "after"), counts, strict=True):
        for index, count in enumerate(row):
            if count:
                x, y = _place(xs, ys, xs.low + index * width, count)
                end, floor = _place(xs, ys, xs.low + (index + 1) * width, 0)
                body += Markup('<rect class="bar {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                    kind, x + 0.5, y, max(end - x - 1, 0.5), floor - y
                )
    for index in range(bins):
        low = xs.low + index * width
        px, py = _place(xs, ys, low + width / 2, max(counts[0][index], counts[1][index]))
        said = f"{names[0]}: {counts[0][index]}, {names[1]}: {counts[1][index]}"
        marks.append([round(px, 1), round(py, 1), f"{number(low)} to {number(low + width)}", said])
    means = [sum(values) / len(values) for values in (before, after)]
    for kind, mean in zip(("before", "after"), means, strict=True):
        x, _ = _place(xs, ys, mean, 0)
        body += Markup('<line class="mean {}" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>').format(
            kind, x, x, TOP, HEIGHT - BOTTOM
        )
    summary = f"{title}: mean {number(means[0])} for {names[0]} and {number(means[1])} for {names[1]}"
    return _chart(title, summary, _axes(xs, ys, x_label, "responses") + body, marks)


def intervals(rows: Sequence[Interval], title: str, x_label: str, neutral: float, xs: Axis) -> Markup:
    """A dot and its interval for each row, with a line at `neutral`, where neither side is better."""
    left, pitch = 120, 36
    height = TOP + pitch * len(rows) + BOTTOM
    floor, end = height - BOTTOM, WIDTH - RIGHT
    body, marks = Markup(""), []
    for tick in xs.ticks:
        x = xs.place(tick, left, end)
        body += Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(x, TOP, floor)
        body += Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            x, floor + 15, number(tick)
        )
    middle = xs.place(neutral, left, end)
    body += Markup('<line class="neutral" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(middle, TOP, floor)
    for index, row in enumerate(rows):
        y = TOP + pitch * (index + 0.5)
        low, x, high = (xs.place(value, left, end) for value in (row.low, row.value, row.high))
        body += Markup('<text class="name" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
            left - 10, y + 4, row.name if len(row.name) <= 18 else row.name[:17] + "…"
        )
        body += Markup('<line class="interval" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
            low, high, y, y
        )
        body += Markup('<circle class="end" cx="{:.1f}" cy="{:.1f}" r="5"/>').format(x, y)
        said = f"{number(row.value)}, 95 % interval {number(row.low)} to {number(row.high)}"
        marks.append([round(x, 1), round(y, 1), row.name, said])
    body += Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        (left + end) / 2, height - 6, x_label
    )
    summary = f"{title}: " + "; ".join(f"{mark[2]} {mark[3]}" for mark in marks)
    return _chart(title, summary, body, marks, height, vertical=True)


def number(value: float) -> str:
    """A figure as the report shows it: three or four significant digits, without an exponent where it can be read."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-4:
        text = f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")
    elif size >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", "−")


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _place(xs: Axis, ys: Axis, x: float, y: float) -> tuple[float, float]:
    return xs.place(x, LEFT, WIDTH - RIGHT), ys.place(y, HEIGHT - BOTTOM, TOP)


def _zero_line(ys: Axis) -> Markup:
    if not ys.low < 0 < ys.high:
        return Markup("")
    y = ys.place(0, HEIGHT - BOTTOM, TOP)
    return Markup('<line class="neutral" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>').format(LEFT, WIDTH - RIGHT, y=y)


def _axes(xs: Axis, ys: Axis, x_label: str, y_label: str) -> Markup:
    floor, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    drawn = Markup("")
    for tick in ys.ticks:
        y = ys.place(tick, floor, TOP)
        drawn += Markup('<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>').format(LEFT, end, y=y)
        drawn += Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
            LEFT - 6, y + 4, number(tick)
        )
    for tick in xs.ticks:
        x = xs.place(tick, LEFT, end)
        drawn += Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            x, floor + 15, number(tick)
        )
    drawn += Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        (LEFT + end) / 2, HEIGHT - 6, x_label
    )
    middle = (TOP + floor) / 2
    return drawn + Markup(
        '<text class="label" transform="translate(11 {}) rotate(-90)" text-anchor="middle">{}</text>'
    ).format(middle, y_label)


def _chart(
    title: str, summary: str, body: Markup, marks: Sequence[object], height: int = HEIGHT, vertical: bool = False
) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {width} {height}" role="img" tabindex="0" aria-label="{summary}" '
        'data-marks="{marks}" data-along="{along}"><title>{title}</title>{body}<g class="hover"></g></svg>'
    ).format(
        width=WIDTH,
        height=height,
        summary=summary,
        marks=json.dumps(marks, ensure_ascii=False, separators=(",", ":")),
        along="y" if vertical else "x",
        title=title,
        body=body,
    )
