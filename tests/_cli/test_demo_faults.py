"""Test the second part of the demo: what it counts, and that it fails if it should."""

from __future__ import annotations

import math
import re

import pytest
from rich.console import Console

from fastapi_topaz._cli import demo_command as _demo_command
from fastapi_topaz._cli.demo import application, policies
from fastapi_topaz._cli.demo_faults import Answer, Ride, Scene, scenes
from kit.console import run


pytestmark = pytest.mark.real_clock

BACKENDS = ["asyncio", "trio"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_demo_shows_each_fault(backend, run_forked):
    ended = run_forked("demo", "--requests", "8", "--backend", backend)

    assert (ended.code, ended.err) == (0, "")
    for fault in ("restart", "freeze", "overload"):
        sent, answered, refused, wrong, _, recovered = ended.row(fault)
        assert int(sent) == int(answered) + int(refused)
        assert int(answered) > 0
        assert wrong == "0"
        assert re.fullmatch(r"\d+\.\d ms", recovered)
    # The restart and the freeze are much longer than the budget of a check.
    assert int(ended.row("restart")[2]) > 0
    assert int(ended.row("freeze")[2]) > 0
    assert ended.out.count("\n answered ") == 3


@pytest.mark.slow
def test_an_output_without_unicode_gets_a_plain_timeline():
    ended = run("demo", "--requests", "8", PYTHONIOENCODING="ascii")

    assert (ended.code, ended.err) == (0, "")
    assert ended.out.isascii()


def test_the_faults_take_less_than_twenty_seconds_with_their_pauses():
    assert sum(each.lasts + 1.5 for each in scenes(policies("myapp"))) < 12


def short(_policies):
    """One scene, whose fault does nothing."""
    return (Scene("nothing", "Nothing", 20.0, 0.2, lambda _: None, lambda _: None),)


def shown(monkeypatch, *, app):
    monkeypatch.setattr(_demo_command, "scenes", short)
    monkeypatch.setattr(_demo_command, "application", app)
    show = _demo_command.Show(
        options=None,
        policy_root="myapp",
        requests=8,
        concurrency=1,
        streams=1,
        has_faults=True,
    )
    return _demo_command.show_demo(show, "asyncio")


def test_without_wrong_answers_the_exit_code_is_0(monkeypatch, capsys):
    assert shown(monkeypatch, app=application) == 0
    assert "nothing" in capsys.readouterr().out


def test_an_application_that_allows_too_much_during_a_fault_fails(monkeypatch, capsys):
    applications = []

    def app(config):
        applications.append(config)
        guarded = application(config)
        if len(applications) == 2:
            # The part with the faults: its guards allow everything.
            for route in guarded.routes:
                for guard in getattr(route, "dependencies", ()):
                    guarded.dependency_overrides[guard.dependency] = lambda: None
        return guarded

    assert shown(monkeypatch, app=app) == 1
    assert re.search(r"Failed: nothing: \d+ wrong answers", capsys.readouterr().out)


def ride_of(*answers, healed_at=1.0):
    return Ride(short(None)[0], [Answer(*each) for each in answers], healed_at)


def test_a_ride_counts_its_answers():
    ride = ride_of(
        (0.0, 0.1, 200, True),
        (0.3, 0.1, 403, True),
        (0.5, 0.4, 503, True),
        (0.9, 0.3, 200, False),
        (1.0, 0.2, None, False),
        (1.1, 0.6, 200, True),
    )
    assert (ride.good, ride.refused, ride.wrong) == (3, 1, 2)
    assert ride.slowest == pytest.approx(0.6)
    assert ride.recovered_after == pytest.approx(0.7)
    assert ride.columns() == [(1, 0), (1, 0), (0, 0), (0, 1), (0, 2), (0, 0), (1, 0)]


def test_a_ride_without_a_good_answer_has_not_recovered():
    ride = ride_of((0.0, 0.1, 200, True), (1.0, 0.1, 503, True))
    assert math.isnan(ride.recovered_after)


@pytest.mark.parametrize("has_blocks, bar", [(True, "▄█"), (False, "=@")])
def test_the_timeline_is_relative_to_the_busiest_column(has_blocks, bar):
    ride = ride_of((0.0, 0.1, 200, True), (0.3, 0.1, 200, True), (0.3, 0.1, 200, True))
    console = Console(width=100)
    with console.capture() as capture:
        console.print(_demo_command.faults_table([ride], has_blocks=has_blocks))

    assert f" answered {bar}" in capture.get()
