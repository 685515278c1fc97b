"""
The machine of decisions with an invalidation bus, which loses and repeats messages.

Another process invalidates, too, and the bus breaks and heals. All invariants of
`model_decisions` hold, and those of `model_bus`.
"""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis.stateful import initialize, rule, run_state_machine_as_test
from hypothesis.strategies import sampled_from

from kit.bus import Peer
from kit.invariants import Broken
from proof.model_decisions import ABOUT, Held
from proof.stepwise import OnTrio, chosen_settings
from proof.test_model_decisions import NUMBERS, DecisionMachine


pytestmark = pytest.mark.usefixtures("no_log")

EXAMPLES, STEPS = 30, 40
"""For one backend. `--hypothesis-profile=deep` multiplies the first."""

SETUPS = [
    (True, "error", False, True),
    (True, "cache_then_error", False, True),
    (True, "cache_then_deny", True, True),
]
GARBAGE = [None, b"x" * 64, [b"x" * 16] * 4, Peer(b"of another key......").beats()]
BREAKS = sampled_from(["down", "mute", "hangs"])


class BusMachine(DecisionMachine):
    """The events on asyncio; `OnTrioMachine` is the same on trio."""

    @initialize(setup=sampled_from(SETUPS))
    def begin(self, setup):
        self.build(setup)

    @rule(number=NUMBERS)
    def ask_and_answer(self, number):
        self.do(partial(self.start, *self.who(number), None))
        self.do(*[partial(call.answer, True) for call in self.server.open])

    ask_and_answer_often = ask_and_answer

    @rule(
        about=sampled_from([None, *ABOUT]),
        fate=sampled_from(["arrives", "arrives", "lost", "twice"]),
    )
    def another_process_says(self, about, fate):
        self.do(partial(self.bus.says, about, fate))

    @rule(number=NUMBERS)
    def an_old_message_comes_again(self, number):
        self.do(partial(self.bus.repeats, number))

    @rule(message=sampled_from(GARBAGE))
    def a_message_cannot_be_read(self, message):
        self.do(partial(self.bus.garbage, message))

    @rule(how=BREAKS)
    def bus_breaks(self, how):
        self.do(partial(self.bus.breaks, how))

    @rule(seconds=sampled_from([0.0, 4.0]))
    def bus_heals(self, seconds):
        self.do(self.bus.heals)
        self.pass_time(seconds)

    @rule(about=sampled_from(ABOUT))
    def a_message_is_lost_and_missed(self, about):
        self.do(partial(self.bus.says, about, "lost"))
        self.do(partial(self.bus.says, None, "arrives"))

    @rule(how=BREAKS, seconds=sampled_from([0.1, 4.0]))
    def bus_breaks_for_a_while(self, how, seconds):
        self.do(partial(self.bus.breaks, how))
        self.pass_time(seconds)
        self.do(self.bus.heals)
        self.pass_time(3.0)

    def quiesce(self):
        """It reaches the bus again within seconds, and sends all that waited."""
        super().quiesce()
        self.do(self.bus.heals)
        self.pass_time(15)
        if self.bus.unsent():
            raise Broken([(Held("each_invalidation_is_sent"), self.bus.unsent())])
        assert self.cache.status().bus.state == "reachable"


class OnTrioMachine(BusMachine):
    """The same on trio."""

    make_world = OnTrio


@pytest.mark.parametrize("machine", [BusMachine, OnTrioMachine])
def test_the_layers_keep_all_invariants_with_an_unreliable_bus(machine):
    chosen = chosen_settings(EXAMPLES, STEPS)
    machine.steps = 0
    run_state_machine_as_test(machine, settings=chosen)
    print(f"{chosen.max_examples} examples, {machine.steps} steps")  # noqa: T201
