"""
Writes the saved results of the benchmarks into the README next to this file.

    .venv/bin/python benchmarks/report.py [--results DIRECTORY] [--to DIRECTORY]

It replaces all text between the two markers. Every number there comes from a file of
results.
"""

from __future__ import annotations

import statistics

from _peers import BACKENDS, OURS
from _rounds import drawing_options, loaded, race_of
from _server import SERVERS
from cancellation import WAITERS
from imports import OURS as OURS_IMPORTED
from metrics import FLOOR, LEASE, NO_SDK, above


START = "<!-- results: written by report.py -->"
END = "<!-- end of results -->"
CALLERS = (1, 10, 20, 100)
TRANSPORTS = (
    *(f"check-20-{server}{suffix}" for server in SERVERS for suffix in ("", "-tls")),
    *(f"endpoint-{backend}" for backend in ("asyncio", "uvloop")),
)
FILES = (
    *(f"acquire-{backend}" for backend in BACKENDS),
    *(f"contended-{backend}" for backend in BACKENDS),
    *(f"check-{count}" for count in CALLERS),
    *(f"check-{count}-tls" for count in CALLERS),
    *TRANSPORTS,
    "streams",
    "cancellation",
    "memory",
    *(f"outage-{backend}" for backend in ("asyncio", "trio")),
    "ends",
    *(f"metrics-{backend}" for backend in BACKENDS),
    "metrics-calls",
    "imports",
    "overload",
    "recovery",
)
REFERENCES = ("bare stub, asyncio", "at 054dee3", "grpcio")
HARDLY = 0.1
"""Leases per task. Below this, a contestant was hardly exercised."""

LABELS = {OURS: "**ours**", NO_SDK: f"**{NO_SDK}**"}


def table(heads, rows, *, words=1):
    """Return a Markdown table. The first *words* columns are text, the rest numbers."""
    rules = ["---"] * words + ["---:"] * (len(heads) - words)
    lines = [heads, rules, *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def label(name):
    return LABELS.get(name, name)


def measured(saved):
    """Return the date, versions and machine. If runs differ, list each of them."""
    kinds = {}
    for name, data in saved.items():
        packages = ", ".join(
            f"{key} {value}" for key, value in data["packages"].items()
        )
        about = f"{data['date']}, {data['python']}, {data['machine']}: {packages}."
        kinds.setdefault(about, []).append(name)
    told = list(kinds)
    if len(kinds) > 1:
        told = [f"- {about} ({', '.join(names)})" for about, names in kinds.items()]
    if any(data["settings"]["quick"] for data in saved.values()):
        told.append("\nSome of it was run with `--quick`: such numbers mean nothing.")
    return "\n".join(["### Measured", "", *told])


def goals(saved):
    met = {True: "met", False: "**missed**", None: "not judged"}
    rows = [
        (name, goal["goal"], goal["reached"], met[goal["met"]])
        for name, data in saved.items()
        for goal in data.get("goals", ())
    ]
    heads = ("measured by", "goal", "reached", "")
    return "### Goals\n\n" + table(heads, rows, words=4)


def rows_of(data, reference):
    race = race_of(data)
    for name in sorted(race.rounds, key=race.median):
        median = f"{race.median(name):.{1 if race.median(name) < 100 else 0}f}"
        yield name, [label(name), median, f"{race.ratio(name, reference):.2f} x"]


def left_out(data):
    return "".join(
        f"\n\n{name} did not finish, and is left out: {why}."
        for name, why in data.get("left_out", {}).items()
    )


def picture(name, text):
    return f"\n\n![{text}](plots/{name}.png)"


def leases(saved):
    """Return the chapter on leases, with free and with contended connections."""
    parts = ["### One free connection"]
    for backend in BACKENDS:
        if data := saved.get(f"acquire-{backend}"):
            rows = [row for _, row in rows_of(data, OURS)]
            heads = (f"on {backend}", "us per lease", "times ours")
            parts.append(table(heads, rows) + left_out(data))
            parts[-1] += picture(f"acquire-{backend}", data["title"])
    parts.append("### 200 tasks and 10 connections")
    for backend in BACKENDS:
        if data := saved.get(f"contended-{backend}"):
            rows = [
                [*row, *(f"{wait:.2f}" for wait in data["waits"][name].values())]
                for name, row in rows_of(data, OURS)
            ]
            heads = (
                *(f"on {backend}", "us per lease", "times ours"),
                *("wait p50, ms", "p99, ms", "longest, ms"),
                *("longest / mean", "the same in turns"),
            )
            parts.append(table(heads, rows) + left_out(data))
            parts[-1] += picture(f"contended-{backend}", data["title"])
    return "\n\n".join(parts)


def checks(saved):
    parts = ["### One check"]
    for suffix, reference in (("", "bare stub, asyncio"), ("-tls", "one client")):
        for count in CALLERS:
            name = f"check-{count}{suffix}"
            data, walls = saved.get(name), saved.get(f"{name}-wall")
            if not data:
                continue
            wall = race_of(walls)
            rows = [
                [
                    *row,
                    f"{wall.median(name):.0f}",
                    f"{wall.ratio(name, reference):.2f} x",
                ]
                for name, row in rows_of(data, reference)
            ]
            heads = (
                *(data["title"], "us of CPU", f"times {reference}"),
                *("us of wall clock", f"times {reference}"),
            )
            parts.append(table(heads, rows))
    return "\n\n".join(parts) + picture("check", "What one check costs")


def transports(saved):
    """Return the chapter on both transports: one check, and one endpoint."""
    parts = []
    for data in filter(None, map(saved.get, TRANSPORTS)):
        race = race_of(data)
        reference = next(each for each in REFERENCES if each in race.rounds)
        heads = (data["title"], "us of CPU", f"times {reference}")
        parts.append(table(heads, [row for _, row in rows_of(data, reference)]))
    return "\n\n".join(["### Both transports", *parts]) if parts else ""


def streams(saved):
    data = saved.get("streams")
    if not data:
        return ""
    race = race_of(data)
    rows = [
        (name, f"{race.median(name):,.0f}", failed(data["failures"][name]))
        for name in race.rounds
    ]
    parts = [
        f"### Limits of streams\n\n{data['title']}.",
        table(("", "checks per second", "failed"), rows),
        f"{data['settings']['callers']:,} callers, and 10 connections:",
    ]
    rows = [
        (
            f"10 x {row['streams']}, {row['backend']}",
            row["limit"] or "none",
            f"{row['rate']:,.0f}",
            f"{row['wait']:.2f} s",
            f"{row['longest']:.2f} s",
            failed(row),
        )
        for row in data["table"]
    ]
    heads = ("", "limit", "checks per second", "wait p50", "longest", "failed")
    parts.append(table(heads, rows) + picture("streams", data["title"]))
    return "\n\n".join(parts)


def failed(who):
    count = sum(who["failed"].values())
    if not count:
        return f"none of {who['checks']:,}"
    kinds = ", ".join(who["failed"])
    return f"{count:,} of {who['checks']:,} ({kinds})"


def cancellation(saved):
    data = saved.get("cancellation")
    if not data:
        return ""
    settings = data["settings"]
    keys = ("rounds", "leases", "cancelled", "served", "swallowed", "lost", "stuck")
    rows = [
        [
            f"{label(row['name'])}, {row['backend']}, {row['how']}",
            *(f"{row[key]:,}" for key in keys),
        ]
        for row in data["table"]
    ]
    notes = [
        f"- {row['name']}, {row['backend']}, {row['how']}: {note}"
        for row in data["table"]
        for note in remarks(row, settings["rounds"])
    ]
    text = (
        "### Mass cancellation\n\n"
        f"Up to {settings['rounds']} rounds of {WAITERS:,} tasks, "
        f"`--seed {settings['seed']}`.\n\n" + table(("", *keys), rows)
    )
    return text + "\n\n" + "\n".join(notes) if notes else text


def remarks(row, rounds):
    """Yield remarks that explain the numbers of one contestant."""
    if row["rounds"] < rounds:
        yield (
            f"did not finish: stopped after {row['rounds']} of {rounds} rounds, "
            f"because a task was stuck in {row['stuck']} of them."
        )
    if row["killed"]:
        yield (
            f"{row['killed']} of these rounds ended only with the process, and what "
            "became of their tasks is not known."
        )
    told = row["rounds"] - row["killed"]
    if not told:
        yield "not exercised: no round told what became of it."
    elif row["leases"] < HARDLY * told * WAITERS and not row["lost"]:
        yield (
            f"hardly exercised: {row['leases']:,} leases, while {row['cancelled']:,} "
            "tasks were cancelled."
        )
    if row["errors"]:
        kinds = ", ".join(f"{count:,} {name}" for name, count in row["errors"].items())
        yield f"raised {kinds}."


def memory(saved):
    data = saved.get("memory")
    if not data:
        return ""
    rows = [
        (
            f"{row['of']}, {row['backend']}",
            f"{row['python'] / 1024:.1f} KiB",
            f"{row['process'] / 1024:.0f} KiB",
        )
        for row in data["connections"]
    ]
    parts = [
        "### Memory, files and threads",
        table(("one idle", "of Python", "of the process"), rows),
    ]
    rows = [
        [row["backend"]]
        + [
            f"{then} -> {now}"
            for then, now in zip(row["before"], row["after"], strict=True)
        ]
        for row in data["leftovers"]
    ]
    heads = ("1,000 connections on", "files", "threads", "Python's threads")
    parts.append(table(heads, rows))
    return "\n\n".join(parts)


def ends(saved):
    data = saved.get("ends")
    if data is None:
        return ""
    heads = ["backend", "without an end", "with one", "share", "failed", "in use"]
    rows = [
        [
            row["backend"],
            f"{row['without an end']:,.0f} /s",
            f"{row['with an end']:,.0f} /s",
            f"{row['share']:.2f} x",
            row["failed"],
            f"{row['in use']:.1f} of 10",
        ]
        for row in data["rows"]
    ]
    return f"### Connections that end\n\n{data['title']}.\n\n{table(heads, rows)}"


def outages(saved):
    found = [saved[name] for name in saved if name.startswith("outage")]
    parts = [table((data["title"], ""), list(data["rows"].items())) for data in found]
    return "\n\n".join(["### An outage", *parts]) if parts else ""


def recovery(saved):
    """Return the chapter on the first answer after an outage."""
    if not (data := saved.get("recovery")):
        return ""
    rows = [
        (
            f"{row['down']:g} s",
            label(row["name"]),
            f"{statistics.median(row['seconds']):.2f} s",
            f"{max(row['seconds']):.2f} s",
        )
        for row in data["rows"]
    ]
    heads = ("the server was down for", "contestant", "first answer, median", "at most")
    body = table(heads, rows, words=2) + picture("recovery", "Recovery by outage")
    return f"### The first answer after an outage\n\n{body}"


def telemetry(saved):
    """Return the chapter on the cost of metrics and traces."""
    parts = []
    for backend in BACKENDS:
        if data := saved.get(f"metrics-{backend}"):
            race = race_of(data)
            rows = [
                (
                    label(name),
                    f"{race.median(name):.1f}",
                    f"{above(race, name, FLOOR):+.2f}",
                    f"{race.ratio(name, NO_SDK):.2f} x",
                )
                for name in race.rounds
            ]
            heads = (f"on {backend}", "us per lease", "above the floor", "times ours")
            parts.append(table(heads, rows))
    if parts:
        parts[-1] += picture("metrics", "What metrics cost a lease")
    if data := saved.get("metrics-calls"):
        race = race_of(data)
        rows = [
            (name, f"{race.median(name):.2f}", f"{race.ratio(name, LEASE):.2f} x")
            for name in race.rounds
        ]
        heads = ("by itself, in a hot loop", "us", f"times {LEASE}")
        parts += [table(heads, rows), f"With {data['with']}."]
    return "\n\n".join(["### Metrics and traces", *parts]) if parts else ""


def imports(saved):
    data = saved.get("imports")
    if not data:
        return ""
    rows = [row for _, row in rows_of(data, OURS_IMPORTED)]
    heads = ("import", "ms of CPU", f"times {OURS_IMPORTED}")
    return "### Imports\n\n" + table(heads, rows)


def overload(saved):
    data = saved.get("overload")
    if not data:
        return ""
    parts = ["### Overload\n\nGoodput, and the median time of the answered checks."]
    rows, names = {}, list(dict.fromkeys(row["name"] for row in data["rows"]))
    for row in data["rows"]:
        key = (row["server"], f"{row['budget']:g} s", row["backend"], row["load"])
        rows.setdefault(key, {})[row["name"]] = row
    heads = ("server", "budget", "backend", "load", *(LABELS.get(x, x) for x in names))
    body = [
        (*key, *(goodput(found.get(name)) for name in names))
        for key, found in rows.items()
    ]
    parts.append(table(heads, body) + picture("overload", "Overload"))
    return "\n\n".join(parts)


def goodput(row):
    if row is None:
        return ""
    median = "" if row["median"] is None else f", {row['median'] * 1000:.0f} ms"
    return f"{row['goodput']:.2f}{median}"


def main(options):
    walls = [f"{name}-wall" for name in FILES if name.startswith("check")]
    saved = {name: loaded(options.results, name) for name in FILES}
    saved = {name: data for name, data in saved.items() if data}
    head = [measured(saved), goals(saved)]
    saved |= {name: loaded(options.results, name) for name in walls}
    chapters = (
        *(
            leases,
            checks,
            transports,
            streams,
            overload,
            cancellation,
            memory,
            outages,
            recovery,
            ends,
            telemetry,
        ),
    )
    chapters += (imports,)
    parts = head + [chapter(saved) for chapter in chapters]
    path = options.to / "README.md"
    text = path.read_text() if path.exists() else f"{START}\n{END}\n"
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    results = "\n\n".join(part for part in parts if part)
    path.write_text(f"{before}{START}\n\n{results}\n\n{END}{after}")


if __name__ == "__main__":
    main(drawing_options(__doc__))
