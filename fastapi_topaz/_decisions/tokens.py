"""
Reads when a JSON Web Token expires, without verifying it.

The authorizer verifies the token. Here, `exp` can only shorten how long an answer is
used. So a forged value does no harm.
"""

from __future__ import annotations

import binascii
import json
import math
from base64 import urlsafe_b64decode
from typing import Any


__all__ = ["expiry"]


def expiry(token: str) -> float | None:
    """
    Return the `exp` of *token*, in seconds since the epoch.

    Returns:
        None if *token* has no `exp` that can be read. If it has several, the earliest.
    """
    found: list[Any] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        # The outermost object comes last. Of equal keys, a parser keeps one.
        found[:] = [value for key, value in items if key == "exp"]
        return dict(items)

    _, _, rest = token.partition(".")
    payload = rest.partition(".")[0]
    try:
        data = urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
        claims = json.loads(data, object_pairs_hook=pairs)
    except (ValueError, RecursionError, binascii.Error):
        return None
    if not isinstance(claims, dict) or not found:
        return None
    if not all(type(value) in {int, float} for value in found):
        return None
    try:
        earliest = min(map(float, found))
    except OverflowError:
        return None
    return earliest if math.isfinite(earliest) else None
