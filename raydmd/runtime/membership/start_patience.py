"""How long a worker may take to start."""

from dataclasses import dataclass

SLOWER = 3.0  # times the role's slowest start so far, after which a start counts as stuck...
LEAST_START_S = 30.0  # ...and at least this many seconds; doubles each time...
MOST_START_S = 1800.0  # ...up to this


@dataclass
class StartPatience:
    """How long a role's worker may be starting before it counts as stuck.

    A machine that is too busy starts none in that time, however often it is asked to: each time that a start is given
    up, the next has twice as long, until one comes up.

    Args:
        first: seconds, while none has come up.
        least: seconds, at any time.
        slowest: seconds that the slowest start took; None: none has come up.
        given_up: how often starts were, in a row.
    """

    first: float
    least: float
    slowest: float | None = None
    given_up: int = 0

    @property
    def seconds(self) -> float:
        """How long."""
        usual = self.first if self.slowest is None else SLOWER * self.slowest
        usual = max(self.least, usual, LEAST_START_S)
        return max(usual, min(usual * 2.0**self.given_up, MOST_START_S))

    def came_up(self, took: float) -> None:
        """Take note of a start that took so many seconds."""
        self.slowest, self.given_up = max(took, self.slowest or 0.0), 0

    def gave_up(self) -> None:
        """Take note that a start, or several at once, took longer."""
        self.given_up += 1
