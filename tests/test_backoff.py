"""The pauses between rounds of connecting."""

from __future__ import annotations

from hypothesis import given, strategies

from fastapi_topaz._backoff import BASE, CAP, full_jitter


@given(
    failures=strategies.integers(1, 10**9),
    random=strategies.floats(0, 1, exclude_max=True),
)
def test_a_pause_is_never_longer_than_the_cap(failures, random):
    assert 0 <= full_jitter(failures, lambda: random) < CAP


def test_the_whole_pause_is_jittered_so_that_a_fleet_does_not_stay_in_step():
    assert full_jitter(1, lambda: 0.0) == 0
    assert full_jitter(1, lambda: 1.0) == BASE
    assert full_jitter(40, lambda: 0.25) == CAP / 4
