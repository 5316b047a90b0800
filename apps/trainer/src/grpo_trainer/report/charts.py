"""Small line and area charts as inline SVG: no script, no download, colours from the page's style sheet."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from grpo_trainer.evaluate.accuracy import Accuracy

__all__ = ["Series", "intervals", "lines", "number", "stacked"]

_WIDTH, _HEIGHT = 460, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 12, 24
_MOST_POINTS = 300


@dataclass(frozen=True)
class Series:
    """One curve.

    Args:
        label: shown in the legend.
        points: (step, value), in the order of steps.
        dots: draw the points themselves instead of a smoothed line (few, separate measurements).
        band: (step, low, high) of a range around the curve.
    """

    label: str
    points: Sequence[tuple[float, float]]
    dots: bool = False
    band: Sequence[tuple[float, float, float]] = ()


def lines(
    series: Sequence[Series],
    *,
    form: Callable[[float], str],
    log: bool = False,
    zero: bool = False,
    smooth: bool = True,
) -> str:
    """A chart of curves: each is drawn faintly as it is, and boldly as a running mean.

    Args:
        series: at least one, each with at least one point.
        form: how to write a value.
        log: logarithmic value axis; values that are not above 0 are left out.
        zero: let the value axis begin at 0.
        smooth: False for what has no noise.

    Returns:
        An <svg> element.
    """
    shown = [_thinned(one.points, positive=log) for one in series]
    bands = [_edges(one.band, positive=log) for one in series]
    everything = [point for points in (*shown, *(edge for band in bands for edge in band)) for point in points]
    if not everything:
        middle = f'<text class="label" x="{_WIDTH / 2}" y="{_HEIGHT / 2}" text-anchor="middle">never above 0</text>'
        return _frame(middle, "never above 0")
    scale = math.log10 if log else float
    low, high = min(scale(y) for _, y in everything), max(scale(y) for _, y in everything)
    ticks = _log_ticks(low, high) if log else _ticks(0.0 if zero else low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    x_of, x_ticks = _steps([x for x, _ in everything])

    def y_of(value: float) -> float:
        return _linear(scale(value), low, high, _HEIGHT - _BOTTOM, _TOP)

    body = [_grid([(y_of(10**tick if log else tick), form(10**tick if log else tick)) for tick in ticks], x_ticks)]
    for index, (one, points, band) in enumerate(zip(series, shown, bands)):
        if not points:
            continue
        places = [(x_of(x), y_of(y)) for x, y in points]
        hue = f"s{index % 6}"
        if all(band):
            rough = not smooth or one.dots
            edges = [[y_of(y) for _, y in edge] for edge in band]
            low_edge, high_edge = edges if rough else map(_smoothed, edges)
            there = [x_of(x) for x, _ in band[0]]
            outline = [*zip(there, low_edge), *reversed(list(zip(there, high_edge)))]
            body.append(f'<path class="band {hue}" d="{_path(outline)}Z"/>')
        if one.dots:
            body.append(f'<path class="line {hue}" d="{_path(places)}"/>')
            body += [
                f'<circle class="dot {hue}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
                f"<title>step {step:g}: {form(value)}</title></circle>"
                for (x, y), (step, value) in zip(places, points)
            ]
            continue
        means = _smoothed([y for _, y in places]) if smooth else [y for _, y in places]
        if smooth and len(points) > 12:
            body.append(f'<path class="raw {hue}" d="{_path(places)}"/>')
        body.append(f'<path class="line {hue}" d="{_path([(x, y) for (x, _), y in zip(places, means)])}"/>')
        body += [
            f'<circle class="hover" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>step {step:g}, {escape(one.label)}: '
            f"{form(value)}</title></circle>"
            for (x, y), (step, value) in zip(places, points)
        ]
    return _frame("".join(body), ", ".join(one.label for one in series))


def stacked(series: Sequence[Series], *, form: Callable[[float], str]) -> tuple[str, int]:
    """A chart of amounts that add up, one column a step.

    The axis follows the usual steps: a first step that compiles would flatten all others.

    Args:
        series: all with the same steps, values at least 0.
        form: how to write a value.

    Returns:
        An <svg> element, and how many steps reach beyond its axis.
    """
    shown = [_thinned(one.points) for one in series]
    steps = [x for x, _ in shown[0]]
    totals = [sum(column) for column in zip(*[[y for _, y in points] for points in shown])]
    usual = sorted(totals)[int(0.9 * (len(totals) - 1))]
    top = max(totals) if max(totals) <= 2 * usual else 1.4 * usual
    ticks = _ticks(0.0, top or 1.0)
    high = ticks[-1]
    x_of, x_ticks = _steps(steps)
    gap = (x_of(steps[-1]) - x_of(steps[0])) / max(1, len(steps) - 1) if len(steps) > 1 else 40.0
    # Few columns stand apart; many touch, or their gaps would flicker.
    reach = gap * (0.42 if len(steps) <= 100 else 0.5)
    body = [_grid([(_linear(t, 0, high, _HEIGHT - _BOTTOM, _TOP), form(t)) for t in ticks], x_ticks)]
    for at, step in enumerate(steps):
        base = 0.0
        centre = x_of(step)
        left, right = max(_LEFT, centre - reach), min(_WIDTH - _RIGHT, centre + reach)
        for index, points in enumerate(shown):
            amount = points[at][1]
            y0, y1 = (_linear(min(v, high), 0, high, _HEIGHT - _BOTTOM, _TOP) for v in (base, base + amount))
            base += amount
            if y0 - y1 > 0.05:
                body.append(
                    f'<rect class="area s{index % 6}" x="{left:.1f}" y="{y1:.1f}" width="{right - left:.1f}" '
                    f'height="{y0 - y1:.1f}">'
                    f"<title>step {step:g}, {escape(series[index].label)}: {form(amount)}</title></rect>"
                )
    svg = _frame("".join(body), ", ".join(one.label for one in series))
    return svg, sum(total > high for total in totals)


def intervals(rows: Sequence[tuple[str, Accuracy]]) -> str:
    """Accuracies as dots with their 95 % intervals on a scale from 0 to 100 %."""
    width, left, right, row = 460, 58, 14, 34
    height = row * len(rows) + 24
    body = []
    for percent in (0, 25, 50, 75, 100):
        x = _linear(percent, 0, 100, left, width - right)
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 20}"/>')
        body.append(f'<text class="tick" x="{x:.1f}" y="{height - 5}" text-anchor="middle">{percent} %</text>')
    for index, (label, accuracy) in enumerate(rows):
        y = row * (index + 0.5) + 2
        low, high = (_linear(bound, 0, 1, left, width - right) for bound in accuracy.interval)
        x = _linear(accuracy.share, 0, 1, left, width - right)
        hue = "muted" if index == 0 and len(rows) > 1 else "s0"
        body.append(f'<text class="label" x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        body.append(f'<line class="whisker {hue}" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(
            f'<circle class="dot {hue}" cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{escape(str(accuracy))}</title></circle>'
        )
    title = "; ".join(f"{label}: {accuracy}" for label, accuracy in rows)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'


def number(value: float) -> str:
    """A value in at most a few characters: 1,234, 0.056, 3.2e-06."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 0.001:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}"


def _frame(body: str, label: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _grid(y_ticks: Sequence[tuple[float, str]], x_ticks: Sequence[tuple[float, str]]) -> str:
    parts = []
    for y, text in y_ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{escape(text)}</text>')
    parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{_HEIGHT - 7}" text-anchor="end">step</text>')
    for x, text in x_ticks:
        parts.append(f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - 7}" text-anchor="middle">{escape(text)}</text>')
    return "".join(parts)


def _steps(steps: Sequence[float]) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    first, last = min(steps), max(steps)
    # A column or a dot at either end needs its own room.
    pad = 0.5 if last > first else 1.0

    def place(step: float) -> float:
        return _linear(step, first - pad, last + pad, _LEFT, _WIDTH - _RIGHT)

    ticks = [tick for tick in _ticks(first, last) if first <= tick <= last and tick == int(tick)]
    return place, [(place(tick), f"{tick:g}") for tick in ticks or [first]]


def _linear(value: float, low: float, high: float, start: float, end: float) -> float:
    return start if high == low else start + (value - low) / (high - low) * (end - start)


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that enclose [low, high]."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        # A curve that stays at 0 is a count or a share: it has no room below.
        spread = abs(high) * 0.1
        low, high = (low - spread, high + spread) if spread else (0.0, 1.0)
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(low), math.ceil(high)
    last = max(last, first + 1)
    return [float(power) for power in range(first, last + 1, max(1, (last - first) // 4))]


def _thinned(points: Sequence[tuple[float, float]], *, positive: bool = False) -> list[tuple[float, float]]:
    """At most a few hundred points: means over equal runs of steps."""
    kept = [(x, y) for x, y in points if not positive or y > 0]
    size = math.ceil(len(kept) / _MOST_POINTS) or 1
    if size == 1:
        return kept
    runs = [kept[start : start + size] for start in range(0, len(kept), size)]
    return [(run[len(run) // 2][0], sum(y for _, y in run) / len(run)) for run in runs]


def _edges(
    band: Sequence[tuple[float, float, float]], *, positive: bool
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """The lower and the upper edge of a band, thinned alike."""
    kept = [(x, low, high) for x, low, high in band if not positive or low > 0]
    return _thinned([(x, low) for x, low, _ in kept]), _thinned([(x, high) for x, _, high in kept])


def _smoothed(values: Sequence[float]) -> list[float]:
    """Centred running mean over about a tenth of the run."""
    half = len(values) // 20
    if not half:
        return list(values)
    means = []
    for at in range(len(values)):
        reach = min(half, at, len(values) - 1 - at) if 0 < at < len(values) - 1 else half // 2
        window = values[max(0, at - reach) : at + reach + 1]
        means.append(sum(window) / len(window))
    return means


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
