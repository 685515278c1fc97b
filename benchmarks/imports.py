"""
Measures the CPU time to import the package, and to import only its libraries.

    .venv/bin/python benchmarks/imports.py [--rounds 15] [--quick] [--save]

Each import runs in a new interpreter. The result is its CPU time minus that of an
interpreter without imports. The libraries below the package are gRPC, the messages of
the authorizer, anyio and OpenTelemetry's API.
"""

from __future__ import annotations

import functools
import resource
import subprocess
import sys

from _rounds import Goal, Race, parsed, parser, save, versions


OURS = "fastapi_topaz"
BELOW = "the libraries below it"
DEPENDENCIES = "the dependencies for FastAPI, too"
FASTAPI = "fastapi"
IMPORTS = {
    OURS: "import fastapi_topaz",
    BELOW: (
        "import attrs, anyio, grpc.aio, opentelemetry.metrics, opentelemetry.trace; "
        "from aserto.authorizer.v2 import authorizer_pb2"
    ),
    DEPENDENCIES: "from fastapi_topaz import require_policy_auto",
    FASTAPI: "import fastapi",
}
GOALS = [Goal(OURS, (FASTAPI,), 1)]


def cpu(program):
    """Return the CPU time of an interpreter that runs *program*, in milliseconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return (user + system) * 1000


def above_nothing(program):
    return cpu(program) - cpu("")


def main(options):
    print(versions("fastapi-topaz-pool", "grpcio", "fastapi"))
    race = Race("One import", "ms of CPU")
    racing = {
        name: functools.partial(above_nothing, program)
        for name, program in IMPORTS.items()
    }
    race.run(racing, options.rounds)
    race.show(BELOW, GOALS)
    save(options, "imports", race.data(GOALS))


if __name__ == "__main__":
    main(parsed(parser(__doc__, rounds=15), rounds=2))
