"""
Feeds bytes that the fuzzer atheris chooses by coverage to the native HTTP/2 client.

    python tests/proof/atheris_http2.py [-max_total_time=600] [other flags of libFuzzer]

The streams of a real server are the first inputs. An exception that escapes, and a call
that stays open, ends the run with an error, and the input is saved as `crash-*`.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris


sys.path[:0] = [str(Path(__file__).parent.parent)]

with atheris.instrument_imports(include=["fastapi_topaz._http2"]):
    from fastapi_topaz._http2.connection import ClientConnection  # noqa: F401

from _http2.test_mutations import CALLS, ended_by, recorded  # noqa: E402


def one_input(data):
    # The first bytes say where the rest is cut, and whether a call is cancelled.
    if len(data) < 3:
        return
    cut = int.from_bytes(data[:2]) % len(data)
    calls, _ = ended_by(data[3:], cut, cancels=bool(data[2] & 1))
    assert len(calls) == CALLS


def main():
    with tempfile.TemporaryDirectory() as corpus:
        rng = random.Random(1)
        for number in range(200):
            data = rng.randbytes(3) + recorded(rng)
            Path(corpus, str(number)).write_bytes(data)
        atheris.Setup([*sys.argv, corpus], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
