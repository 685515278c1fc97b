"""
Which address a channel is connected to.

grpc.aio tells nobody, but its core keeps the books of channelz, and this reads them.
It is for people who look at a pool, so a book that cannot be read is no error.
"""

from __future__ import annotations

import json
import threading
import urllib.parse
from typing import TYPE_CHECKING, Any

from grpc._cython import cygrpc


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import grpc


__all__ = ["Peer"]


class Peer:
    """
    The other end of a channel and the socket that leads there, found by its number.

    Strictly private.
    """

    _lock = threading.Lock()
    _newest = 0

    def __init__(self, number: int | None) -> None:
        self._number = number
        self._socket: int | None = None

    @classmethod
    def of_new(
        cls, open_channel: Callable[[], grpc.aio.Channel]
    ) -> tuple[grpc.aio.Channel, Peer]:
        """Return what *open_channel* returns, and the peer it will have."""
        # Numbers grow and a channel does not know its own: it is the newest one, as
        # long as nobody else opens channels.
        with cls._lock:
            channel = open_channel()
            try:
                number = _newest_after(cls._newest)
            except Exception:  # noqa: BLE001  (the books are not part of any contract)
                return channel, cls(None)
            cls._newest = number
        return channel, cls(number)

    def address(self) -> str | None:
        """Return the address, such as `ipv4:127.0.0.1:8282`, while connected."""
        if self._number is None:
            return None
        try:
            channel = _read(cygrpc.channelz_get_channel, self._number)["channel"]
            numbers = [int(one["subchannelId"]) for one in channel["subchannelRef"]]
        except Exception:  # noqa: BLE001  (as above)
            return None
        for number in numbers:
            try:
                found = _read(cygrpc.channelz_get_subchannel, number)["subchannel"]
                for socket in found.get("socketRef", ()):
                    self._socket = int(socket["socketId"])
                    # It is called "chttp2 ipv4:127.0.0.1:8282".
                    return str(socket["name"]).rpartition(" ")[2]
            except Exception:  # noqa: BLE001, S112
                # Those of the addresses that were not chosen go while we read.
                continue
        return None

    def tried(self) -> list[tuple[str, str | None]]:
        """
        Return each address of the target, and why it failed if it did.

        The status of a failed call has the reason of the last address only.
        """
        if self._number is None:
            return []
        found: list[tuple[str, str | None]] = []
        try:
            channel = _read(cygrpc.channelz_get_channel, self._number)["channel"]
            for one in channel["subchannelRef"]:
                number = int(one["subchannelId"])
                entry = _read(cygrpc.channelz_get_subchannel, number)["subchannel"]
                # An IPv6 address is percent-encoded there.
                address = urllib.parse.unquote(str(entry["data"]["target"]))
                events = entry["data"].get("trace", {}).get("events", ())
                found.append((address, _last_failure(events)))
        except Exception:  # noqa: BLE001, S110  (as above)
            pass
        return found

    def is_gone(self) -> bool:
        """Say whether the socket that `address` found is closed; takes about 0.3 ms."""
        if self._socket is None:
            return False
        try:
            cygrpc.channelz_get_socket(self._socket)
        except ValueError:  # it is in the books no more
            return True
        except Exception:  # noqa: BLE001  (as above)
            return False
        return False


def _last_failure(events: Sequence[dict[str, str]]) -> str | None:
    for event in reversed(events):
        _, failed, reason = event["description"].partition("TRANSIENT_FAILURE: ")
        if failed:
            # Lines about gRPC's own source code follow.
            return reason.partition("\n")[0]
    return None


def _newest_after(number: int) -> int:
    more = True
    while more:  # a page holds a hundred
        page = _read(cygrpc.channelz_get_top_channels, number + 1)
        number = max(int(top["ref"]["channelId"]) for top in page["channel"])
        more = not page.get("end", True)
    return number


def _read(book: Callable[[int], str], number: int) -> Any:
    return json.loads(book(number))
