"""Line plots and bars as inline SVG: pure functions from numbers to text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 420, 240  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 26, 34
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed")
_MAX_POINTS = 400
_LEGEND_COLUMNS = 3


def line_plot(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str = "step") -> str:
    """One polyline a name through (x, y) points.  Points that are not finite are left out; "" without any point."""
    finite = {
        name: thin([(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)])
        for name, points in lines.items()
    }
    every = [point for points in finite.values() for point in points]
    if not every:
        return ""
    (x_low, x_high), (y_low, y_high) = span([x for x, _ in every]), span([y for _, y in every])
    parts = [_frame(title, x_label, x_low, x_high, y_low, y_high)]
    for index, (name, points) in enumerate(finite.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(f"{_across(x, x_low, x_high):.1f},{_up(y, y_low, y_high):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if len(finite) > 1:
            row, column = divmod(index, _LEGEND_COLUMNS)
            place, line = _LEFT + 8 + column * 110, _TOP + 12 + row * 12
            halo = 'paint-order="stroke" stroke="#fff" stroke-width="3"'  # readable where a line runs behind it
            parts.append(f'<text x="{place}" y="{line}" fill="{colour}" {halo}>{escape(name)}</text>')
    return _svg(parts)


def bar_plot(title: str, bars: Mapping[str, float], mark: float | None = None) -> str:
    """Bars of values in [0, 1], with the value above each; ``mark``: a dashed line (chance, a target)."""
    if not bars:
        return ""
    parts = [_frame(title, "", 0, 1, 0, 1, x_numbers=False)]
    room = (WIDTH - _LEFT - _RIGHT) / len(bars)
    for index, (name, value) in enumerate(bars.items()):
        left, top = _LEFT + (index + 0.2) * room, _up(value, 0, 1)
        parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{0.6 * room:.1f}" height="{HEIGHT - _BOTTOM - top:.1f}" '
            f'fill="{_COLOURS[index % len(_COLOURS)]}"/>'
        )
        middle = left + 0.3 * room
        parts.append(f'<text x="{middle:.1f}" y="{top - 4:.1f}" text-anchor="middle">{value:.3f}</text>')
        parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{escape(name)}</text>')
    if mark is not None:
        y = _up(mark, 0, 1)
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#666" stroke-dasharray="4"/>'
        )
    return _svg(parts)


def span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest, a little apart where they are equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def thin(points: Sequence[tuple[float, float]], limit: int = _MAX_POINTS) -> list[tuple[float, float]]:
    """At most about ``limit`` points, evenly taken, the last one included."""
    stride = max(1, math.ceil(len(points) / limit))
    kept = list(points[::stride])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _across(x: float, low: float, high: float) -> float:
    return _LEFT + (x - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)


def _up(y: float, low: float, high: float) -> float:
    return HEIGHT - _BOTTOM - (y - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)


def _frame(
    title: str, x_label: str, x_low: float, x_high: float, y_low: float, y_high: float, x_numbers: bool = True
) -> str:
    right, base = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = [
        f'<text x="{WIDTH / 2}" y="15" text-anchor="middle" font-weight="bold">{escape(title)}</text>',
        f'<path d="M{_LEFT},{_TOP} V{base} H{right}" fill="none" stroke="#999"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>',
    ]
    for part in (0.0, 0.5, 1.0):
        y, x = y_low + part * (y_high - y_low), x_low + part * (x_high - x_low)
        parts.append(f'<text x="{_LEFT - 4}" y="{_up(y, y_low, y_high) + 4:.1f}" text-anchor="end">{y:.3g}</text>')
        if x_numbers:
            parts.append(
                f'<text x="{_across(x, x_low, x_high):.1f}" y="{base + 14}" text-anchor="middle">{x:.4g}</text>'
            )
    return "".join(parts)


def _svg(parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return f'{head} font-family="sans-serif" font-size="11">{"".join(parts)}</svg>'
