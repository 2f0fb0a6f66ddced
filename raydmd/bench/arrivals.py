"""When requests come and what they ask for, settled before the clock starts."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raydmd.errors import UserError
from raydmd.serving.contract import Size

MEASURED, WARMUP, GAPS = 0, 1, 2  # streams of random numbers: each starts anew from the seed


@dataclass(frozen=True)
class Request:
    """One request of a load.

    Attributes:
        number: in its load, from 0.
        prompt: what to make.
        n: how many pictures.
        seed: of the pictures.
        size: of a picture, in pixels; None for the model's own.
    """

    number: int
    prompt: str
    n: int
    seed: int
    size: Size | None


@dataclass(frozen=True)
class Mix:
    """What requests ask for; request ``number`` of a seed is always the same one.

    Attributes:
        prompts: of which each request takes one.
        n: pictures of a request.
        sizes: of pictures, with the weight of each; empty for the model's own.
        seed: of the choices and of the pictures.
    """

    prompts: Sequence[str]
    n: int = 1
    sizes: Sequence[tuple[Size, float]] = ()
    seed: int = 0

    def request(self, number: int, stream: int = MEASURED) -> Request:
        """Return request ``number``."""
        random = np.random.default_rng([self.seed, stream, number])
        prompt = self.prompts[int(random.integers(len(self.prompts)))]
        size = None
        if self.sizes:
            weights = np.array([weight for _, weight in self.sizes])
            size = self.sizes[int(random.choice(len(weights), p=weights / weights.sum()))][0]
        return Request(number, prompt, self.n, int(random.integers(2**31)), size)


@dataclass(frozen=True)
class Arrival:
    """A line of a trace: seconds from its first, and what it says of the request; None: as the mix has it."""

    at: float
    asks: dict[str, Any] = field(default_factory=dict)


def poisson(rate: float, count: int, seed: int) -> list[Arrival]:
    """Return ``count`` arrivals of a Poisson process of ``rate`` a second; the first is at 0.

    The same seed gives the same pattern at every rate, only faster or slower.
    """
    gaps = np.random.default_rng([seed, GAPS]).exponential(1.0 / rate, max(0, count - 1))
    return [Arrival(float(at)) for at in np.concatenate([[0.0], np.cumsum(gaps)])[:count]]


def read_trace(path: Path) -> list[Arrival]:
    """Return a trace's arrivals in order, the first at 0.

    A line is a number of seconds, or a JSON object with ``timestamp`` in seconds and, if they are to differ from the
    mix, ``prompt``, ``n`` and ``size``. Blank lines and lines that start with # are left out.

    Raises:
        UserError: no such file, nothing in it, or a line that is neither; it names the line.
    """
    arrivals = []
    for number, line in enumerate(read_lines(path, "--trace"), start=1):
        if not line or line.startswith("#"):
            continue
        try:
            arrivals.append(_arrival(line))
        except UserError as error:
            raise UserError(f"--trace {path}: line {number}: {error}") from None
    if not arrivals:
        raise UserError(f"--trace {path}: no arrival in it")
    arrivals.sort(key=lambda arrival: arrival.at)
    return [Arrival(arrival.at - arrivals[0].at, arrival.asks) for arrival in arrivals]


def _arrival(line: str) -> Arrival:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        raise UserError(f"neither a number of seconds nor a JSON object: {line[:60]}") from None
    given = value if isinstance(value, dict) else {"timestamp": value}
    at = given.get("timestamp")
    if isinstance(at, bool) or not isinstance(at, int | float) or not math.isfinite(at):
        raise UserError(f"timestamp: a number of seconds is needed, not {at!r}")
    asks: dict[str, Any] = {}
    if given.get("prompt") is not None:
        asks["prompt"] = str(given["prompt"])
    if (n := given.get("n")) is not None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise UserError(f"n: a whole number above 0 is needed, not {n!r}")
        asks["n"] = n
    if given.get("size") is not None:
        asks["size"] = parse_size(str(given["size"]))
    return Arrival(float(at), asks)


def parse_size(text: str) -> Size:
    """Return width and height of ``WxH``.

    Raises:
        UserError: it is something else.
    """
    width, x, height = text.strip().lower().partition("x")
    if not (x and width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise UserError(f"size: WIDTHxHEIGHT in pixels is needed, as 512x512, not '{text}'")
    if not int(width) or not int(height):
        raise UserError(f"size: both sides are above 0, not '{text}'")
    return int(width), int(height)


def parse_sizes(text: str) -> list[tuple[Size, float]]:
    """Return sizes and their weights of ``WxH[:WEIGHT],...``.

    Raises:
        UserError: a size that is none, or a weight that is not above 0.
    """
    sizes = []
    for part in text.split(","):
        size, colon, weight = part.partition(":")
        try:
            share = float(weight) if colon else 1.0
        except ValueError:
            share = 0.0
        if not (share > 0 and math.isfinite(share)):
            raise UserError(f"--size {part}: a weight is a number above 0, not '{weight}'")
        sizes.append((parse_size(size), share))
    return sizes


def read_lines(path: Path, option: str) -> list[str]:
    """Return a text file's lines without the blanks around them.

    Raises:
        UserError: there is no such file, or it is no text.
    """
    if not path.is_file():
        raise UserError(f"{option}: no file '{path}'")
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"{option}: '{path}' is no UTF-8 text") from None


def read_prompts(path: Path) -> list[str]:
    """Return a file's prompts, one a line.

    Raises:
        UserError: there is no such file, or nothing in it.
    """
    prompts = [line for line in read_lines(path, "--prompts") if line]
    if not prompts:
        raise UserError(f"--prompts: '{path}' has no prompt in it")
    return prompts
