"""How long a worker may be starting: longer each time that none has come up."""

from raydmd.runtime.membership.start_patience import LEAST_START_S, MOST_START_S, StartPatience


def test_it_follows_the_slowest_start() -> None:
    patience = StartPatience(first=300.0, least=10.0)
    assert patience.seconds == 300.0
    patience.came_up(4.0)
    assert patience.seconds == LEAST_START_S
    patience.came_up(50.0)
    patience.came_up(20.0)
    assert patience.seconds == 150.0
    patience.least = 200.0
    assert patience.seconds == 200.0


def test_it_doubles_until_a_start_comes_up() -> None:
    patience = StartPatience(first=300.0, least=10.0)
    patience.came_up(20.0)
    given = []
    for _ in range(7):
        given.append(patience.seconds)
        patience.gave_up()
    assert given == [60.0, 120.0, 240.0, 480.0, 960.0, MOST_START_S, MOST_START_S]
    patience.came_up(400.0)  # a start that the first patience would have ended
    assert patience.seconds == 1200.0


def test_what_the_recipe_asks_for_is_never_cut() -> None:
    patience = StartPatience(first=7200.0, least=10.0)
    patience.gave_up()
    assert patience.seconds == 7200.0
