"""Who is let in: no more than can be made in the time that people will wait."""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from raydmd.serving.contract import Maker, Overloaded

REMEMBERED = 256  # completions from which the rate is measured
ENOUGH = 8  # completions, before which it is not known
MOST_FULL = 0.1  # seconds for which all may be refused without being looked at
HALVED = 10.0  # seconds of work: a light load shows less than can be made, so the best rate counts, until forgotten


class Admission:
    """Counts samples of one model on their way and measures how fast they are made.

    Args:
        samples: that may be on their way at once.
        seconds: that a newcomer may have to wait.
        alone: who is refused here would be let in by nobody else.
        maker: who makes them.
    """

    def __init__(self, samples: int, seconds: float, alone: bool = True, maker: Maker = "student") -> None:
        self.samples, self.seconds, self.alone, self.maker = samples, seconds, alone, maker
        self.inside = 0
        self._done: deque[tuple[float, int]] = deque(maxlen=REMEMBERED)  # since work began
        self._rate: float | None = None

    @contextmanager
    def admitted(self, count: int) -> Iterator[None]:
        """Let ``count`` samples in for the time of the block.

        Raises:
            Overloaded: they would wait too long. A request that finds nobody inside is always let in.
        """
        wait = self.inside / self._rate if self._rate else 0.0
        full = wait > self.seconds or self.inside >= self.samples
        if self.inside and (full or self.inside + count > self.samples):
            # a tenth of the queue makes no difference to who waits in it, and it does not run dry meanwhile
            hold = min(MOST_FULL, wait / 10) if full and self.alone else 0.0
            raise Overloaded(max(1.0, math.ceil(wait - self.seconds / 2)), hold, self.maker)
        if not self.inside:
            self._done.clear()
            self._done.append((time.monotonic(), 0))
        self.inside += count
        try:
            yield
            self._finished(count)
        finally:
            self.inside -= count

    def _finished(self, count: int) -> None:
        before, now = self._done[-1][0], time.monotonic()
        self._done.append((now, count))
        first, at_first = self._done[0]
        if len(self._done) > ENOUGH and now > first:
            rate = (sum(number for _, number in self._done) - at_first) / (now - first)
            self._rate = max(rate, (self._rate or 0.0) * 0.5 ** ((now - before) / HALVED))
