"""Shares by speed: nothing is lost, no cut is better, and a cut changes only where that is worth it."""

from itertools import product

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from raydmd.runtime.workers.shares import WORTH, better_counts, counts_by_speed, even_counts

settings.register_profile("patient", deadline=None, database=None)
settings.load_profile("patient")
SPEED = st.integers(1, 100).map(float)
SPEEDS = st.lists(SPEED, min_size=1, max_size=6)
TOTAL = st.integers(0, 60)


def seconds(counts: list[int], speeds: list[float]) -> float:
    return max(count / speed for count, speed in zip(counts, speeds, strict=True))


@given(TOTAL, SPEEDS)
def test_every_piece_is_taken_once(total: int, speeds: list[float]) -> None:
    counts = counts_by_speed(total, speeds)
    assert len(counts) == len(speeds) and sum(counts) == total and min(counts) >= 0


@given(st.integers(0, 9), st.lists(SPEED, min_size=1, max_size=4))
def test_no_cut_is_done_sooner(total: int, speeds: list[float]) -> None:
    cuts = (cut for cut in product(range(total + 1), repeat=len(speeds)) if sum(cut) == total)
    best = min(seconds(list(cut), speeds) for cut in cuts)
    assert seconds(counts_by_speed(total, speeds), speeds) == best


@given(TOTAL, SPEEDS)
def test_a_faster_worker_takes_no_less(total: int, speeds: list[float]) -> None:
    counts = counts_by_speed(total, speeds)
    for mine, speed in zip(counts, speeds, strict=True):
        assert all(mine >= other for other, slower in zip(counts, speeds, strict=True) if slower < speed)


@given(TOTAL, SPEEDS, st.data())
def test_who_becomes_faster_takes_no_less_and_leaves_others_no_more(
    total: int, speeds: list[float], data: st.DataObject
) -> None:
    who = data.draw(st.integers(0, len(speeds) - 1))
    faster = [speed + data.draw(SPEED) * (n == who) for n, speed in enumerate(speeds)]
    before, after = counts_by_speed(total, speeds), counts_by_speed(total, faster)
    assert after[who] >= before[who]
    assert all(after[n] <= before[n] for n in range(len(speeds)) if n != who)


@given(TOTAL, st.integers(1, 8), SPEED)
def test_equal_workers_share_evenly(total: int, workers: int, speed: float) -> None:
    even = even_counts(total, workers)
    assert sum(even) == total and max(even) - min(even) <= 1 and even == sorted(even, reverse=True)
    assert counts_by_speed(total, [speed] * workers) == even
    assert better_counts(even, [speed] * workers) is even


@given(TOTAL, SPEEDS)
def test_a_cut_changes_where_that_is_worth_it_and_only_there(total: int, speeds: list[float]) -> None:
    even = even_counts(total, len(speeds))
    best = counts_by_speed(total, speeds)
    found = better_counts(even, speeds)
    worth = seconds(even, speeds) > WORTH * seconds(best, speeds)
    assert found == (best if worth else even)
    assert better_counts(found, speeds) is found  # it stays
    assert seconds(found, speeds) <= WORTH * seconds(best, speeds)


def test_worth() -> None:
    assert better_counts([5, 5], [100.0, 100.0]) == [5, 5]
    assert better_counts([5, 5], [1.0, 1.2]) == [5, 5]  # no other cut is sooner done
    assert better_counts([11, 10], [1.0, 1.1]) == [11, 10]  # 11 s or 10 s: just not worth it
    assert better_counts([5, 5], [1.0, 4.0]) == [2, 8]
    assert better_counts([2, 8], [4.0, 1.0]) == [8, 2]  # and back, when speeds change


@given(TOTAL, SPEEDS, st.data())
def test_nothing_changes_while_a_speed_is_unknown(total: int, speeds: list[float], data: st.DataObject) -> None:
    assume(len(speeds) > 1)
    counts = counts_by_speed(total, speeds[::-1])
    unknown: list[float | None] = list(speeds)
    unknown[data.draw(st.integers(0, len(speeds) - 1))] = data.draw(st.sampled_from([None, 0.0]))
    assert better_counts(counts, unknown) is counts
