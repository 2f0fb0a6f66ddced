import pytest
import torch
from scipy import stats

from raydmd.diffusion.random import Key, integer, normal, uniform

KEY = Key(seed=7, phase=2, stream="rollout", update=1003)
OTHERS = [Key(8, 2, "rollout", 1003), Key(7, 1, "rollout", 1003), Key(7, 2, "time", 1003), Key(7, 2, "rollout", 1004)]
PINNED_NORMAL = [0.782466939268764, 1.429093439501126, 0.164425220348433, 0.368719310755558]
PINNED_INTEGER = 677109


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (1, 8, 8), (5, 7)])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_any_cut_of_the_batch_gives_the_same_bits(shape: tuple[int, ...], chunk: int) -> None:
    count = 101
    for draw in (normal, uniform):
        whole = draw(KEY, 0, count, shape)
        assert whole.shape == (count, *shape)
        parts = [draw(KEY, start, min(chunk, count - start), shape) for start in range(0, count, chunk)]
        assert torch.equal(torch.cat(parts), whole)


def test_a_sample_far_into_the_stream_needs_none_before_it() -> None:
    assert torch.equal(normal(KEY, 10**12, 5, (6,))[3:], normal(KEY, 10**12 + 3, 2, (6,)))
    assert normal(KEY, 4, 0, (3, 2)).shape == (0, 3, 2)


def test_numbers_do_not_change_from_one_version_to_the_next() -> None:
    expected = torch.tensor(PINNED_NORMAL, dtype=torch.float64)
    torch.testing.assert_close(normal(KEY, 5, 1, (4,), torch.float64)[0], expected, rtol=0, atol=1e-12)
    assert integer(KEY, 10**6) == PINNED_INTEGER


def test_normal_numbers_are_normal() -> None:
    x = normal(KEY, 0, 2000, (5, 20), torch.float64)
    n = x.numel()
    for power, moment, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(float((x**power).mean()) - moment) < 4 * (variance / n) ** 0.5
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 0.01
    assert stats.kstest((1.02 * x).flatten().numpy(), "norm").pvalue < 0.01  # the test can tell 2 % of spread
    assert stats.kstest(uniform(KEY, 0, 2000, (50,)).flatten().numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("other", OTHERS)
def test_another_key_gives_independent_numbers(other: Key) -> None:
    for draw in (normal, uniform):
        a, b = draw(KEY, 0, 1000, (100,)), draw(other, 0, 1000, (100,))
        assert not torch.equal(a, b)
        assert abs(correlation(a, b)) < 4 / a.numel() ** 0.5
        assert correlation(a, draw(KEY, 0, 1000, (100,))) == pytest.approx(1.0)


def test_samples_and_elements_are_independent_of_one_another() -> None:
    x = normal(KEY, 0, 1001, (100,))
    bound = 4 / 1e5**0.5
    assert abs(correlation(x[1:], x[:-1])) < bound
    assert abs(correlation(x[:, 1:], x[:, :-1])) < bound
    # Box-Muller makes a pair of one radius: elements of a pair share no power either.
    assert abs(correlation(x[:, :50] ** 2, x[:, 50:] ** 2)) < bound * 2**0.5


def test_shapes_and_kinds_share_no_words() -> None:
    assert not torch.equal(normal(KEY, 0, 8, (4,)).flatten(), normal(KEY, 0, 4, (8,)).flatten())
    assert torch.equal(normal(KEY, 0, 8, (2, 2)).flatten(), normal(KEY, 0, 8, (4,)).flatten())
    a, b = normal(KEY, 0, 1000, (100,)), uniform(KEY, 0, 1000, (100,))
    assert abs(correlation(a, b)) < 4 / a.numel() ** 0.5


def test_dtypes_and_range() -> None:
    assert normal(KEY, 0, 2, (3,)).dtype == torch.float32
    assert normal(KEY, 0, 2, (3,), torch.bfloat16).dtype == torch.bfloat16
    u = uniform(KEY, 0, 100_000)
    assert u.dtype == torch.float64 and u.shape == (100_000,)
    assert 0.0 <= float(u.min()) < 1e-4 and 1 - 1e-4 < float(u.max()) < 1.0
    assert normal(KEY, 0, 1000, (1000,)).isfinite().all()


def test_integer_is_even_over_updates() -> None:
    draws = [integer(Key(7, 1, "exit", update), 4) for update in range(4000)]
    assert stats.chisquare([draws.count(k) for k in range(4)]).pvalue > 0.01
    assert set(draws) == {0, 1, 2, 3} and integer(KEY, 1) == 0


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError):
        normal(KEY, -1, 2, (3,))
    with pytest.raises(ValueError):
        integer(KEY, 0)
