"""
The books about an invalidation bus: what another process said, lost and repeated.

They know from the events alone when the bus cannot be trusted, and what this process
must have heard. `DecisionBooks` compares that with each decision.
"""

from __future__ import annotations

import math

from fastapi_topaz._decisions.seal import derived
from fastapi_topaz._decisions.tags import Tagger
from kit.bus import KEY, FakeBus, Peer


PATIENCE = 4.0
"""With the `denied_ttl_seconds` of the model."""


class BusBooks:
    """
    The bus of a machine, and another process on it.

    Args:
        machine: The machine, which has a clock, a sequence and a cache.
    """

    def __init__(self, machine):
        self.machine = machine
        self.bus = FakeBus()
        self.peer = Peer()
        self.heard = []
        # Whether a message of the other process was lost that nothing has replaced.
        self.missing = False
        self.bad_from = math.inf
        self.bad_until = -math.inf
        self.was_reachable = False
        self.own = []

    @property
    def is_bad(self):
        """Whether this process must know by now that the bus cannot be trusted."""
        now = self.machine.now()
        return now >= self.bad_from or now < self.bad_until

    def note(self, about):
        self.machine.invalidations.append((self.machine.tick(), about))

    # -- events -----------------------------------------------------------------------

    def breaks(self, how):
        now, bus = self.machine.now(), self.bus
        if how == "down":
            bus.go_down()
            self.bad_from = min(self.bad_from, now)
        else:
            bus.is_mute = bus.is_mute or how == "mute"
            bus.hangs = bus.hangs or how == "hangs"
            self.bad_from = min(self.bad_from, now + PATIENCE + 1e-3)

    def heals(self):
        self.bus.is_down = self.bus.is_mute = self.bus.hangs = False
        self.bad_from = math.inf

    def says(self, about, fate):
        """The other process invalidates something, or sends a message without tags."""
        messages = [self.peer.beats()] if about is None else self.peer.says(**about)
        for message in messages:
            is_lost = fate == "lost" or not self.bus._receivers
            if is_lost or self.bus.is_mute:
                # A message without tags is not missing: the next one has its number.
                self.missing = self.missing or about is not None
                continue
            self.heard.append(message)
            for _ in range(2 if fate == "twice" else 1):
                self.bus.pass_on(message)
            if self.missing:
                self.missing = False
                self.note({})
        if about is not None and fate != "lost" and not self.missing:
            self.note(about)

    def repeats(self, number):
        """An old message of the other process comes once more."""
        if self.heard:
            self.bus.pass_on(self.heard[number % len(self.heard)])

    def garbage(self, message):
        if self.bus._receivers:
            self.bus.pass_on(message)
            self.bad_until = self.machine.now() + PATIENCE

    # -- invariants -------------------------------------------------------------------

    def look(self):
        """After an outage, nothing is used that was asked for before its end."""
        is_reachable = self.machine.cache.status().bus.state == "reachable"
        if is_reachable and self.is_bad:
            self.machine.breaks("a_bad_bus_is_unreachable", self.machine.now())
        if is_reachable and not self.was_reachable:
            self.note({})
        self.was_reachable = is_reachable

    def unsent(self):
        """Return what was invalidated here and never sent."""
        tagger = Tagger(derived(KEY, b"topaz bus tags"))
        sent = {frozenset(message[3:]) for message in self.bus.journal}
        about = {"identity": None, "policy_path": None, "resource": None}
        return [
            each
            for each in self.own
            for tags in tagger.concerned(**about | each)
            if (tags or {tagger.everything}) not in sent
        ]
