"""Test the pauses between rounds of connect attempts."""

from __future__ import annotations

from hypothesis import given, strategies

from fastapi_topaz._pool.state.backoff import BASE, CAP, DEMAND_CAP, FLOOR, full_jitter


@given(
    failures=strategies.integers(1, 10**9),
    share=strategies.floats(0, 1, exclude_max=True),
    cap=strategies.sampled_from([CAP, DEMAND_CAP]),
)
def test_a_pause_is_between_the_floor_and_the_cap(failures, share, cap):
    assert FLOOR <= full_jitter(failures, share, cap) < cap


@given(
    failures=strategies.integers(1, 100),
    share=strategies.floats(0, 1, exclude_max=True),
)
def test_the_pause_for_waiting_callers_is_never_the_longer_one(failures, share):
    assert full_jitter(failures, share, DEMAND_CAP) <= full_jitter(failures, share)


def test_the_pause_doubles_up_to_its_cap():
    pauses = [full_jitter(failures, 1.0) for failures in range(1, 8)]
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    demanded = [full_jitter(failures, 1.0, DEMAND_CAP) for failures in range(1, 6)]
    assert demanded == [0.1, 0.2, 0.4, 0.5, 0.5]


def test_the_whole_pause_is_jittered_to_spread_a_fleet():
    assert full_jitter(1, 1.0) == BASE
    assert full_jitter(40, 0.25) == CAP / 4
    assert full_jitter(40, 0.0) == FLOOR == 0.05
