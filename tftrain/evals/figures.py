"""Figures of the report as text: inline SVG that follows the page's colours, and points as a picture in the page.

Every figure carries a sentence that says what it shows, for those who do not see it.
Shapes: R rows, K columns, C cells.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from tftrain.evals.extra import need

COLOURS = (
    "#4e79a7",
    "#f28e2b",
    "#59a14f",
    "#e15759",
    "#b07aa1",
    "#76b7b2",
    "#edc948",
    "#ff9da7",
    "#9c755f",
    "#86bcb6",
    "#d37295",
    "#a0cbe8",
    "#8cd17d",
    "#b6992d",
    "#d4a6c8",
    "#bab0ac",
)
"""Of groups of points, in both themes; they repeat after the last."""


@dataclass(frozen=True)
class Bar:
    """One bar: a model's value with its interval."""

    name: str
    kind: str
    """`own`, `baseline` or `oracle`: a CSS class."""
    value: float
    low: float | None
    high: float | None


def bars(title: str, shown: Sequence[Bar], chance: float | None) -> str:
    """Horizontal bars from 0 with 95 % whiskers and, dashed, what guessing gets."""
    # All bars of a page are as wide together with their names, so that two stand side by side.
    left, step, top = max(96, 14 + 6.8 * max(len(bar.name) for bar in shown)), 22, 6
    width = max(376 - left, 120)
    ends = [end for bar in shown for end in (bar.value, bar.low, bar.high) if end is not None]
    least, most = min(0.0, *ends), max(1e-9, *ends, chance or 0.0)
    most = 1.0 if least == 0 and 0.45 < most <= 1 else most + 0.06 * (most - least)
    x = lambda value: left + width * (value - least) / (most - least)  # noqa: E731
    height = top + step * len(shown) + 22
    parts = []
    for tick in _ticks(least, most):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{height - 20}"/>')
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{height - 6}" text-anchor="middle">{tick:g}</text>')
    for number, bar in enumerate(shown):
        y = top + step * number
        begin, end = sorted((x(0.0), x(bar.value)))
        parts.append(f'<text class="name" x="{left - 8:.0f}" y="{y + 15}" text-anchor="end">{escape(bar.name)}</text>')
        parts.append(
            f'<rect class="bar {bar.kind}" x="{begin:.1f}" y="{y + 4}" width="{max(end - begin, 1):.1f}" height="14" '
            'rx="2"/>'
        )
        if bar.low is not None and bar.high is not None:
            low, high, middle = x(bar.low), x(bar.high), y + 11
            parts.append(
                f'<path class="whisker" d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8'
                f'M{high:.1f} {middle - 4}v8"/>'
            )
        said = _interval(bar)
        parts.append(f'<text class="value" x="{left + width + 8:.0f}" y="{y + 15}">{said}</text>')
    if chance is not None and chance > least:
        parts.append(f'<line class="chance" x1="{x(chance):.1f}" x2="{x(chance):.1f}" y1="{top}" y2="{height - 20}"/>')
    told = "; ".join(f"{bar.name} {_interval(bar)}" for bar in shown)
    told += f"; chance {chance:.2f}" if chance is not None else ""
    return _svg(left + width + 118, height, f"{title}: {told}", parts, "bars")


def heat(
    title: str, value_RK: np.ndarray, rows: Sequence[str], columns: Sequence[str], *, text_RK: np.ndarray | None = None
) -> str:
    """A table of values from 0 to 1 as shades; NaN is left blank. `text_RK` is written into the squares."""
    R, K = value_RK.shape
    cell = 44 if max(R, K) <= 6 else 30 if max(R, K) <= 16 else 14
    is_written = cell >= 30
    left = 14 + 6.6 * max(map(len, rows))
    slant = 10 + 5.0 * max(map(len, columns))
    parts = []
    for k, name in enumerate(columns):
        x, y = left + cell * (k + 0.5), slant
        parts.append(f'<text class="name" transform="translate({x + 3:.0f} {y:.0f}) rotate(-45)">{escape(name)}</text>')
    for r, name in enumerate(rows):
        y = slant + 6 + cell * r
        parts.append(
            f'<text class="name" x="{left - 6:.0f}" y="{y + cell / 2 + 4:.0f}" text-anchor="end">{escape(name)}</text>'
        )
        for k in range(K):
            value = value_RK[r, k]
            x = left + cell * k
            square = f'x="{x:.0f}" y="{y:.0f}" width="{cell - 2}" height="{cell - 2}" rx="2"'
            if not np.isfinite(value):
                parts.append(f'<rect class="blank" {square}/>')
                continue
            share = float(np.clip(value, 0, 1))
            parts.append(f'<rect class="blank" {square}/><rect class="shade" {square} fill-opacity="{share:.2f}"/>')
            if is_written:
                word = f"{value:.2f}" if text_RK is None else str(text_RK[r, k])
                dark = " over" if share > 0.55 else ""
                parts.append(
                    f'<text class="inside{dark}" x="{x + cell / 2 - 1:.0f}" y="{y + cell / 2 + 3:.0f}" '
                    f'text-anchor="middle">{word}</text>'
                )
    told = "; ".join(
        f"{row}: " + ", ".join(f"{column} {value_RK[r, k]:.2f}" for k, column in enumerate(columns))
        for r, row in enumerate(rows)
        if K <= 16
    )
    width = left + cell * K + 0.72 * 6.6 * len(columns[-1])
    return _svg(width, slant + 8 + cell * R, f"{title}. {told}".strip(), parts, "heat")


def curve(title: str, series: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> str:
    """Lines of (name, x, y) over a common axis; y is cut at its 98th percentile so that a steep start hides nothing."""
    width, height, left, bottom, top = 400, 200, 44, 26, 8
    x_all = np.concatenate([np.asarray(x, float) for _, x, _ in series])
    y_all = np.concatenate([np.asarray(y, float) for _, _, y in series])
    low, high = float(y_all.min()), float(np.percentile(y_all, 98))
    high = high if high > low else low + 1
    span = max(float(x_all.max() - x_all.min()), 1.0)
    to_x = lambda v: left + (width - left - 8) * (v - x_all.min()) / span  # noqa: E731
    to_y = lambda v: top + (height - top - bottom) * (1 - (np.minimum(v, high) - low) / (high - low))  # noqa: E731
    parts = []
    for tick in _ticks(low, high):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 8}" y1="{to_y(tick):.1f}" y2="{to_y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{to_y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(float(x_all.min()), float(x_all.max())):
        parts.append(f'<text class="tick" x="{to_x(tick):.1f}" y="{height - 8}" text-anchor="middle">{tick:g}</text>')
    for number, (name, x, y) in enumerate(series):
        points = " ".join(f"{to_x(a):.1f},{to_y(b):.1f}" for a, b in zip(x, y))
        parts.append(f'<polyline class="line s{number}" points="{points}"/>')
        parts.append(
            f'<text class="key s{number}" x="{width - 12}" y="{top + 14 + 16 * number}" text-anchor="end">'
            f"{escape(name)}</text>"
        )
    told = "; ".join(f"{name} ends at {y[-1]:.3f} at step {x[-1]:g}" for name, x, y in series)
    return _svg(width, height, f"{title}: {told}", parts, "curve")


def points(xy_C2: np.ndarray, group_C: np.ndarray, n_groups: int) -> str:
    """A `data:` address of a PNG without background: cells in their groups' colours, in a random order."""
    figure = need("matplotlib.figure").Figure(figsize=(3.4, 3.0))
    need("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    order_C = np.random.default_rng(0).permutation(len(xy_C2))
    colours = np.array([colour(group) for group in range(max(n_groups, 1))])
    size = float(np.clip(16_000 / max(len(xy_C2), 1), 1.5, 14))
    axis.scatter(*xy_C2[order_C].T, c=colours[group_C[order_C]], s=size, linewidths=0, alpha=0.85)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, transparent=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def colour(group: int) -> str:
    """Of a group of points."""
    return COLOURS[group % len(COLOURS)]


def _interval(bar: Bar) -> str:
    if bar.low is None or bar.high is None:
        return f"{bar.value:.2f}"
    return f"{bar.value:.2f} [{bar.low:.2f}, {bar.high:.2f}]"


def _ticks(low: float, high: float) -> list[float]:
    """Four or five round numbers between the ends."""
    rough = (high - low) / 4
    unit = 10 ** np.floor(np.log10(rough))
    step = unit * min((1, 2, 2.5, 5, 10), key=lambda m: abs(m * unit - rough))
    first = np.ceil(low / step - 1e-9) * step
    return [round(float(tick), 10) + 0.0 for tick in np.arange(first, high + step * 1e-6, step)]


def _svg(width: float, height: float, alt: str, parts: Sequence[str], kind: str) -> str:
    alt = escape(alt, quote=True)
    return (
        f'<svg class="{kind}" role="img" aria-label="{alt}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}"><title>{alt}</title>{"".join(parts)}</svg>'
    )
