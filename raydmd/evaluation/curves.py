"""Line charts as inline SVG: they take their colours from the page, so they follow its light or dark ground."""

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 20, 26
BINS = 240
WINDOW = 0.03  # of the bins, on either side, that the running median takes in
LOG_FROM = 30.0


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: shown in the legend.
        color: any CSS colour.
        x: rising positions.
        y: values; those that are not finite are left out.
        breaks: positions that the running median never looks across, as the start of a phase.
    """

    name: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    breaks: Sequence[float] = ()


@dataclass(frozen=True)
class Band:
    """A shaded range of x, with a word at its top, and optionally a dashed level ``guide`` across it."""

    start: float
    end: float
    name: str
    color: str
    guide: float | None = None


def chart(title: str, lines: Sequence[Line], bands: Sequence[Band] = (), *, percent: bool = False) -> str:
    """Return an SVG chart of ``lines`` over iterations; an empty string when there is nothing to draw.

    Each line is drawn as its range inside a bin, faint, and as a running median, full. The y axis is logarithmic when
    positive values span more than a factor of 30; where a few values tower above all others (an iteration that waited,
    say), they are cut off at the top.

    Args:
        title: what is drawn, also the text for those who cannot see it.
        lines: the curves.
        bands: phases, say, shaded behind them.
        percent: the values are shares, drawn from 0 to 100 %.
    """
    kept = [(line, _bins(line)) for line in lines]
    kept = [(line, bins) for line, bins in kept if bins]
    if not kept:
        return ""
    values = _without_towers([y for _, bins in kept for b in bins for y in (b.low, b.high)])
    values += [band.guide for band in bands if band.guide is not None]
    log = not percent and min(values) > 0 and max(values) / min(values) > LOG_FROM
    ends = [bins[k].x for _, bins in kept for k in (0, -1)]
    x_axis = _Axis.over(ends, LEFT, WIDTH - RIGHT, exact=True)
    y_axis = _Axis.over([0.0, 1.0] if percent else values, HEIGHT - BOTTOM, TOP, log=log)
    parts = [_band(band, x_axis, y_axis) for band in bands]
    parts += [_y_tick(tick, y_axis, percent) for tick in y_axis.ticks]
    parts += [
        f'<text class="tick" x="{x_axis.at(t):.1f}" y="{HEIGHT - 9}" text-anchor="middle">{_number(t)}</text>'
        for t in x_axis.ticks
    ]
    parts += [_curve(line, bins, x_axis, y_axis) for line, bins in kept]
    last = ", ".join(f"{line.name} ends at {_number(bins[-1].mean, percent)}" for line, bins in kept)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}: {escape(last)}">'
        + "".join(parts)
        + "</svg>"
    )


@dataclass(frozen=True)
class _Bin:
    x: float
    low: float
    high: float
    mean: float


def _bins(line: Line) -> list[_Bin]:
    """Gather neighbouring values, so that a run of any length draws as at most ``BINS`` points."""
    pairs = [(float(x), float(y)) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    size = max(1, -(-len(pairs) // BINS))
    groups = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return [
        _Bin(sum(x for x, _ in g) / len(g), min(y for _, y in g), max(y for _, y in g), sum(y for _, y in g) / len(g))
        for g in groups
    ]


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels, with round ticks."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def over(
        cls, values: Sequence[float], start: float, end: float, *, log: bool = False, exact: bool = False
    ) -> "_Axis":
        low, high = min(values), max(values)
        if log:
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            ticks = tuple(m * 10.0**p for p in powers for m in ((1, 2, 5) if len(powers) <= 3 else (1,)))
            ticks = tuple(tick for tick in ticks if low * 0.99 <= tick <= high * 1.01)
            return cls(low / 1.05, high * 1.05, start, end, True, ticks)
        if high <= low:
            high, low = (high + 1, low) if exact else (high + abs(high) * 0.1 + 1e-6, low - abs(low) * 0.1 - 1e-6)
        step = _round_step((high - low) / 4)
        if not exact:
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        first = math.ceil(low / step - 1e-9)
        ticks = tuple(k * step for k in range(first, math.floor(high / step + 1e-9) + 1))
        return cls(low, high, start, end, False, ticks)

    def at(self, value: float) -> float:
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def _round_step(step: float) -> float:
    """Return the nearest 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return min((1, 2, 5, 10), key=lambda m: abs(m * power - step)) * power


def _band(band: Band, x: _Axis, y: _Axis) -> str:
    left, right = max(x.at(band.start), LEFT), min(x.at(band.end), WIDTH - RIGHT)
    if right <= left:
        return ""
    shade = (
        f'<rect x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}" '
        f'fill="{band.color}" opacity=".1"/>'
        f'<text class="band" x="{left + 4:.1f}" y="{TOP - 6}">{escape(band.name)}</text>'
    )
    if band.guide is None:
        return shade
    level = y.at(band.guide)
    return shade + f'<line class="guide" x1="{left:.1f}" x2="{right:.1f}" y1="{level:.1f}" y2="{level:.1f}"/>'


def _y_tick(tick: float, y: _Axis, percent: bool) -> str:
    at = y.at(tick)
    return (
        f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_number(tick, percent)}</text>'
    )


def _without_towers(values: list[float]) -> list[float]:
    """Leave out the few values that are many times all the others."""
    usual = sorted(values)[int(0.98 * (len(values) - 1))]
    return [value for value in values if value <= 3 * usual] if usual > 0 else values


def _curve(line: Line, bins: list[_Bin], x: _Axis, y: _Axis) -> str:
    reach = max(1, round(WINDOW * len(bins)))
    smooth = []
    for number, b in enumerate(bins):
        near = bins[max(0, number - reach) : number + reach + 1]
        near = [other for other in near if bisect(line.breaks, other.x) == bisect(line.breaks, b.x)]
        smooth.append((b.x, median(other.mean for other in near)))
    if any(b.high > b.low for b in bins):
        edge = [(b.x, b.high) for b in bins] + [(b.x, b.low) for b in reversed(bins)]
        faint = f'<polygon points="{_points(edge, x, y)}" fill="{line.color}" opacity=".22"/>'
    else:
        raw = [(b.x, b.mean) for b in bins]
        faint = f'<polyline points="{_points(raw, x, y)}" stroke="{line.color}" class="raw"/>'
    return f'{faint}<polyline points="{_points(smooth, x, y)}" stroke="{line.color}" class="mean"/>'


def _points(pairs: Sequence[tuple[float, float]], x: _Axis, y: _Axis) -> str:
    return " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in pairs)


def _number(value: float, percent: bool = False) -> str:
    if percent:
        return f"{100 * value:.0f}%"
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:.4g}"
