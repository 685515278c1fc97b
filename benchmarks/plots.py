"""
Draws pictures of the saved results of the benchmarks.

    .venv/bin/python benchmarks/plots.py [--results DIRECTORY] [--to DIRECTORY]

If results are missing, their pictures are left out.
"""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from _peers import BACKENDS, OURS
from _rounds import drawing_options, loaded, race_of
from metrics import FLOOR as NO_METRICS
from metrics import LEAKS, above
from PIL import Image


mpl.use("Agg")  # works without a display

from matplotlib import pyplot as plt


MINE = "#0b7a5b"
OTHER = "#b9c1ca"
FLOOR = "#dfe4ea"
MINE_TOO = "#a9d6c6"
LINE = "#e0803a"
TEXT = "#1f2933"
FAINT = "#5b6773"
FAIR = 3
SHARED = "one shared channel"

LABELS = {
    "floor": "floor: a limiter and a list",
    "limiter": "floor: anyio's limiter",
    "limiter, fail_after": "floor: limiter with a timeout",
    NO_METRICS: "floor: no metrics",
}

plt.rcParams.update(
    {
        "font.size": 11,
        "text.color": TEXT,
        "axes.labelcolor": FAINT,
        "xtick.color": FAINT,
        "ytick.color": TEXT,
        "axes.edgecolor": "#cfd6dd",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.bottom": False,
        "xtick.bottom": False,
        "ytick.left": False,
    }
)


def label(name):
    """Return the label of a contestant in pictures."""
    return LABELS.get(name, name).replace("AsyncAdaptedQueuePool", "async")


def color(name):
    if name.startswith((OURS, "pool")):
        return MINE
    return FLOOR if name.startswith(("floor", "limiter")) else OTHER


def figure(title, subtitle, columns=1, **more):
    drawn, axes = plt.subplots(
        1, columns, figsize=(8, 4.5), dpi=100, squeeze=False, **more
    )
    drawn.suptitle(title, x=0.02, y=0.98, ha="left", fontsize=13, fontweight="bold")
    drawn.text(0.02, 0.895, subtitle, ha="left", va="top", fontsize=10, color=FAINT)
    return drawn, list(axes[0])


def bars(axis, names, values, texts):
    """Draw horizontal bars, the first at the top, with a text at the end of each."""
    shades = [color(name) for name in names]
    axis.barh(names, values, color=shades, height=0.72 * min(1, len(names) / 5))
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlim(0, max(values) * 1.02)
    axis.set_xticks([])
    for place, (name, value, text) in enumerate(zip(names, values, texts, strict=True)):
        axis.annotate(
            text,
            (value, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            fontweight="bold" if color(name) == MINE else "normal",
        )


def name_bars(axis, names):
    axis.set_yticks(range(len(names)), [label(name) for name in names])
    for name, tick in zip(names, axis.get_yticklabels(), strict=True):
        if color(name) == MINE:
            tick.set_fontweight("bold")
            tick.set_color(MINE)


def acquire(data, backend):
    race = race_of(data)
    names = sorted(race.rounds, key=race.median)
    drawn, (axis,) = figure(
        f"Taking a free connection and giving it back, on {backend}",
        f"Microseconds for one lease, one task, median of {rounds(data)}; "
        "x: times ours",
    )
    bars(
        axis,
        names,
        [race.median(name) for name in names],
        [f"{race.median(name):.1f}   {times(race, name)}" for name in names],
    )
    name_bars(axis, names)
    drawn.subplots_adjust(left=0.39, right=0.85, top=0.82, bottom=0.04)
    return drawn


def contended(data, backend):
    race = race_of(data)
    names = sorted(race.rounds, key=race.median)
    settings = data["settings"]
    drawn, (costs, waits) = figure(
        f"{settings['tasks']} tasks share 10 connections, on {backend}",
        f"Each takes {settings['leases']} leases; median of {rounds(data)}; "
        f"x: times ours; dashed: goal, {FAIR}",
        columns=2,
        width_ratios=(3, 2),
    )
    bars(
        costs,
        names,
        [race.median(name) for name in names],
        [f"{race.median(name):.0f}   {times(race, name)}" for name in names],
    )
    name_bars(costs, names)
    costs.set_title("microseconds for one lease", **PANEL)
    longest = [data["waits"][name]["by mean"] for name in names]
    bars(waits, names, longest, [f"{each:.1f}" for each in longest])
    waits.set_yticks([])
    waits.axvline(FAIR, color=LINE, linewidth=1, linestyle="--")
    waits.set_xlim(0, max(FAIR + 1, *longest))
    waits.set_title("longest wait / mean wait", **PANEL)
    drawn.subplots_adjust(left=0.31, right=0.94, top=0.77, bottom=0.04, wspace=0.5)
    return drawn


PANEL = {"loc": "left", "fontsize": 10, "color": FAINT}


def check(results):
    """Return a picture with a panel for each number of callers."""
    found = {
        count: data
        for count in (1, 10, 20, 100)
        if (data := loaded(results, f"check-{count}"))
    }
    if not found:
        return None
    names = [
        f"{who}, {backend}" for who in ("bare stub", "pool") for backend in BACKENDS
    ]
    names = [name for name in names if name in next(iter(found.values()))["rounds"]]
    drawn, axes = figure(
        "One check: the pool, and bare gRPC with nothing around it",
        "Microseconds of CPU of the process, and times what the bare stub takes on "
        "asyncio",
        columns=len(found),
    )
    most = 0
    for axis, (count, data) in zip(axes, found.items(), strict=True):
        race = race_of(data)
        medians = [race.median(name) for name in names]
        ratios = [race.ratio(name, "bare stub, asyncio") for name in names]
        bars(axis, names, medians, [f"{each:.2f} x" for each in ratios])
        for place, each in enumerate(medians):
            axis.annotate(
                f"{each:.0f}",
                (0, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color="white" if color(names[place]) == MINE else TEXT,
            )
        axis.set_yticks([])
        axis.set_title("one at a time" if count == 1 else f"{count} at once", **PANEL)
        most = max(most, *medians)
    for axis in axes:
        axis.set_xlim(0, most * 1.62)
    name_bars(axes[0], names)
    drawn.subplots_adjust(left=0.2, right=0.99, top=0.77, bottom=0.04, wspace=0.08)
    return drawn


def streams(data):
    limits = {MINE: 100, MINE_TOO: None}
    rows = [row for row in data["table"] if row["backend"] == "asyncio"]
    counts = sorted({row["streams"] for row in rows})
    if not rows:
        return None
    drawn, (rates, failures) = figure(
        "A server that lets a connection carry 100 calls",
        "Each answer takes 100 ms, so that what counts is how many calls fit",
        columns=2,
        width_ratios=(3, 2),
    )
    for offset, (shade, limit) in zip((-0.2, 0.2), limits.items(), strict=True):
        chosen = [row for row in rows if row["limit"] == limit]
        chosen.sort(key=lambda row: row["streams"])
        places = [counts.index(row["streams"]) + offset for row in chosen]
        rates.barh(
            places,
            [row["rate"] for row in chosen],
            height=0.38,
            color=shade,
            label=f"limit of {limit}" if limit else "no limit",
        )
        for place, row in zip(places, chosen, strict=True):
            failed = sum(row["failed"].values())
            told = f"{row['rate']:,.0f}"
            told += f", {failed / row['checks']:.1%} fail" if failed else ""
            rates.annotate(
                told,
                (row["rate"], place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=10,
            )
    rates.set_ylim(len(counts) - 0.5, -0.5)
    rates.set_yticks(range(len(counts)), [f"10 x {count}" for count in counts])
    rates.set_xlim(0, 1.5 * max(row["rate"] for row in rows))
    rates.set_xticks([])
    rates.legend(frameon=False, loc="upper right", fontsize=10)
    rates.set_title("checks per second of pools, connections x streams", **PANEL)
    told = {
        "one shared channel, asyncio": "one shared\nchannel",
        "pool of 10 x 50, asyncio": "pool 10 x 50,\nasyncio",
        "pool of 10 x 50, trio": "pool 10 x 50,\ntrio",
    }
    names = [name for name in told if name in data["failures"]]
    shares = []
    texts = []
    for name in names:
        failed = sum(data["failures"][name]["failed"].values())
        shares.append(100 * failed / data["failures"][name]["checks"])
        texts.append(f"{shares[-1]:.0f} %" if failed else "none")
    bars(failures, names, shares, texts)
    failures.set_xlim(0, 120)
    failures.set_yticks(range(len(names)), [told[name] for name in names])
    failures.set_title("checks that failed, 500 callers", **PANEL)
    drawn.subplots_adjust(left=0.12, right=0.97, top=0.77, bottom=0.04, wspace=0.5)
    return drawn


def metrics(results):
    """Return a picture with a panel for each backend."""
    found = {
        backend: data
        for backend in BACKENDS
        if (data := loaded(results, f"metrics-{backend}"))
    }
    if not found:
        return None
    first = next(iter(found.values()))
    # LEAKS takes many times as long as the others. It is a tool to find a leak.
    names = [name for name in first["rounds"] if name != LEAKS]
    drawn, axes = figure(
        "What metrics cost a lease",
        f"Microseconds for one lease, one task, median of {rounds(first)}; "
        "+: above the floor",
        columns=len(found),
    )
    most = 0
    for axis, (backend, data) in zip(axes, found.items(), strict=True):
        race = race_of(data)
        medians = [race.median(name) for name in names]
        texts = [
            f"{race.median(name):.1f}"
            + (f"   {above(race, name, NO_METRICS):+.1f}" if name != NO_METRICS else "")
            for name in names
        ]
        bars(axis, names, medians, texts)
        axis.set_yticks([])
        axis.set_title(f"on {backend}", **PANEL)
        most = max(most, *medians)
    for axis in axes:
        axis.set_xlim(0, most * 1.75)
    name_bars(axes[0], names)
    drawn.subplots_adjust(left=0.31, right=0.99, top=0.77, bottom=0.04, wspace=0.08)
    return drawn


def overload(data):
    """Return the answers by load, and over the time of an overload."""
    servers = ["ten workers, 50 ms, 10x1", "one at a time, 10 ms, 10x50"]
    drawn, axes = figure(
        "Overload: answers within a budget of 1 s",
        "Share of what the server can do. Virtual time, asyncio",
        3,
    )
    drawn.subplots_adjust(left=0.07, right=0.98, top=0.76, wspace=0.3)
    rows = [x for x in data["rows"] if x["backend"] == "asyncio" and x["budget"] == 1]
    for axis, server in zip(axes, servers, strict=False):
        axis.set_title(server, fontsize=10, color=FAINT)
        for name in dict.fromkeys(row["name"] for row in rows):
            mine = [x for x in rows if (x["server"], x["name"]) == (server, name)]
            loads = [row["load"] for row in mine]
            shares = [row["goodput"] for row in mine]
            axis.plot(loads, shares, **line_of(name), label=name)
        axis.set_xlabel("load / capacity")
        axis.set_ylim(0, 1.15)
    last = axes[2]
    last.set_title("30 s of five times the capacity", fontsize=10, color=FAINT)
    for path in data["recoveries"]:
        if path["backend"] == "asyncio":
            last.plot(path["seconds"], **line_of(path["name"]), label=path["name"])
    last.set_xlabel("seconds")
    last.set_ylim(0, 1.15)
    axes[0].legend(frameon=False, fontsize=9)
    return drawn


def goodput(data):
    """Return the answers by load, of the pool and of one shared channel."""
    chosen = [
        row
        for row in data["rows"]
        if (row["server"], row["budget"], row["backend"])
        == ("ten workers, 50 ms, 10x1", 1, "asyncio")
    ]
    if not chosen:
        return None
    drawn, (axis,) = figure(
        "Overload: the pool answers what the server can do",
        "Answers within 1 s, as share of what the server can do; "
        f"measured {data['date']}",
    )
    for name in (OURS, SHARED):
        rows = [row for row in chosen if row["name"] == name]
        loads, shares = zip(*((x["load"], x["goodput"]) for x in rows), strict=True)
        axis.plot(loads, shares, marker="o", **line_of(name))
        axis.annotate(
            "this pool" if name == OURS else name,
            (loads[-1], shares[-1]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="right",
            color=line_of(name)["color"],
            fontweight="bold",
        )
    axis.set_xlabel("checks that come, times what the server can do")
    axis.set_ylim(-0.04, 1.15)
    axis.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    drawn.subplots_adjust(left=0.09, right=0.97, top=0.82, bottom=0.13)
    return drawn


def recovery(data):
    """Return the time to the first answer after outages, as bars."""
    downs = sorted({row["down"] for row in data["rows"]})
    drawn, (axis,) = figure(
        "Recovery: seconds from the restart of a server to the first answer",
        f"Median of {rounds(data)}, line: from least to most; "
        f"measured {data['date']}, asyncio",
    )
    for offset, name in ((-0.2, OURS), (0.2, SHARED)):
        rows = sorted(
            (row for row in data["rows"] if row["name"] == name),
            key=lambda row: row["down"],
        )
        places = [place + offset for place in range(len(rows))]
        medians = [float(np.median(row["seconds"])) for row in rows]
        shade = MINE if name == OURS else LINE
        shown = "this pool" if name == OURS else name
        axis.barh(places, medians, height=0.36, color=shade, label=shown)
        for place, row, median in zip(places, rows, medians, strict=True):
            least, most = min(row["seconds"]), max(row["seconds"])
            axis.plot([least, most], [place, place], color=TEXT, linewidth=1)
            axis.annotate(
                f"{median:.1f} s",
                (most, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontweight="bold" if name == OURS else "normal",
            )
    axis.set_yticks(range(len(downs)), [f"down for {down:g} s" for down in downs])
    axis.set_ylim(len(downs) - 0.5, -0.5)
    axis.set_xticks([])
    axis.set_xlim(0, 1.15 * max(max(row["seconds"]) for row in data["rows"]))
    axis.legend(frameon=False, loc="upper right")
    drawn.subplots_adjust(left=0.17, right=0.97, top=0.82, bottom=0.04)
    return drawn


def line_of(name):
    colors = {OURS: MINE, SHARED: LINE}
    # Another commit may lie below another line.
    style = "-" if name in colors else (0, (3, 3))
    return {
        "color": colors.get(name, FAINT),
        "linestyle": style,
        "linewidth": 1.8,
        "zorder": 1 if name in colors else 3,
    }


def rounds(data):
    count = data["settings"]["rounds"]
    return f"{count} rounds" if count > 1 else "one round"


def times(race, name):
    ratio = race.ratio(name, OURS)
    return "" if name == OURS else f"{ratio:.{1 if ratio > 2 else 2}f} x"


def pictures(results):
    """Yield the name and picture of each saved result."""
    for backend in BACKENDS:
        for draw in (acquire, contended):
            name = f"{draw.__name__}-{backend}"
            if data := loaded(results, name):
                yield name, draw(data, backend)
    yield "check", check(results)
    if data := loaded(results, "streams"):
        yield "streams", streams(data)
    yield "metrics", metrics(results)
    if data := loaded(results, "overload"):
        yield "overload", overload(data)
        yield "goodput", goodput(data)
    if data := loaded(results, "recovery"):
        yield "recovery", recovery(data)


def main(options):
    directory = options.to / "plots"
    directory.mkdir(parents=True, exist_ok=True)
    for name, drawn in pictures(options.results):
        if drawn is None:
            continue
        path = directory / f"{name}.png"
        drawn.canvas.draw()
        image = Image.fromarray(np.asarray(drawn.canvas.buffer_rgba()))
        # 64 colors are enough, and take a third of the bytes.
        image.convert("RGB").quantize(64).save(path, optimize=True)
        plt.close(drawn)
        print(f"{name}.png: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(drawing_options(__doc__))
