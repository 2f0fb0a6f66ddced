"""Who is let in, and who is told to ask again later."""

from contextlib import ExitStack
from typing import Any

import pytest

from raydmd.serving.admission import Admission
from raydmd.serving.contract import Overloaded
from raydmd.serving.http.errors import as_api_error


def test_who_would_wait_too_long_is_refused() -> None:
    admission = Admission(samples=10, seconds=1.0)
    with admission.admitted(50):  # nobody is inside: let in, whatever it asks for
        with pytest.raises(Overloaded), admission.admitted(1):
            pass
        assert admission.inside == 50
    assert admission.inside == 0
    with admission.admitted(4), admission.admitted(6):
        with pytest.raises(Overloaded) as error, admission.admitted(1):
            pass
        assert error.value.retry_after >= 1 and error.value.full_seconds == 0  # no rate is known yet
    with pytest.raises(ZeroDivisionError), admission.admitted(1):
        _ = 1 / 0
    assert admission.inside == 0


def test_the_wait_is_reckoned_from_what_was_made_of_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("raydmd.serving.admission.time.monotonic", lambda: now)
    admission = Admission(samples=1000, seconds=2.0)
    with admission.admitted(1):  # always somebody inside, so that it is busy all the time
        for _ in range(20):
            with admission.admitted(5):
                now += 0.5  # ten a second
        with admission.admitted(19):
            with admission.admitted(1):  # 20 wait: 2 s
                with pytest.raises(Overloaded) as error, admission.admitted(1):
                    pass
                assert error.value.full_seconds == 0.1  # at most, though 2 s wait
        with pytest.raises(Overloaded) as error, admission.admitted(1000):
            pass
        assert error.value.full_seconds == 0  # who asks for less is let in


@pytest.mark.parametrize("maker", ["student", "teacher"])
def test_a_refusal_says_whose_queue_is_full(maker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("raydmd.serving.admission.time.monotonic", lambda: now)
    admission = Admission(samples=2, seconds=2.0, maker=maker)
    with admission.admitted(1):
        for _ in range(20):
            with admission.admitted(1):
                now += 0.5
        with admission.admitted(1), pytest.raises(Overloaded) as error, admission.admitted(1):
            pass
    told = as_api_error(error.value, "req").response().headers
    assert told["x-raydmd-full"] == maker and int(told["x-raydmd-full-ms"]) > 0


def room(admission: Admission) -> int:
    """Return how many samples may be inside before one more is refused; those let in here leave undone."""
    with pytest.raises(Overloaded), ExitStack() as inside:
        while True:
            inside.enter_context(admission.admitted(1))
            most = admission.inside
    return most


def test_what_ends_all_at_once_took_the_time_since_work_began(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def clock() -> float:
        nonlocal now
        now += 0.0001  # between two looks
        return now

    monkeypatch.setattr("raydmd.serving.admission.time.monotonic", clock)
    admission = Admission(samples=1000, seconds=2.0)
    for _ in range(2):
        with ExitStack() as batch:
            for _ in range(16):
                batch.enter_context(admission.admitted(1))
            now += 1.6  # ten a second
        assert room(admission) == 20
        now += 3600.0  # without work


def test_a_rate_is_forgotten_with_time_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("raydmd.serving.admission.time.monotonic", lambda: now)
    admission = Admission(samples=1000, seconds=2.0)

    def make(count: int, rate: float) -> None:
        nonlocal now
        for _ in range(count):
            with admission.admitted(1):
                now += 1 / rate

    with admission.admitted(1):
        make(300, 400.0)
        assert room(admission) >= 799
        make(300, 100.0)  # a light load for three seconds
        assert room(admission) >= 600
        make(300, 5.0)  # slower ones for a minute
        assert room(admission) <= 11
