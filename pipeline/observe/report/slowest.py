"""The table of trainer ranks and servers by phase, with the straggler named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from pipeline.observe.report.figure import Figure
from pipeline.observe.report.run_files import Run
from pipeline.observe.stragglers import SAMPLING, SHARE, STEPS, TIMES, WINDOW, Straggler, Stragglers, table_of

_ROWS = 64  # of a table: the slowest


def figures(run: Run) -> list[Figure]:
    """None where one rank and one server have nobody to be held against."""
    steps = [(row, run.records[int(row["step"])]) for row in run.metrics if int(row["step"]) in run.records]
    known = [(row, record) for row, record in steps if "ranks" in record]
    if not known or max(map(len, table_of(known[-1][1]["ranks"], known[-1][1]["servers"]).values()), default=0) < 2:
        return []
    stragglers, found = Stragglers(lambda _: None), list[Straggler]()
    for row, record in known:
        step_s = row.get("time/step_s", 0.0)
        table = table_of(record["ranks"], record["servers"])
        found = stragglers.hear(table, step_s, row.get("time/rollout_s", step_s))
    last = [record for _, record in known[-WINDOW:]]
    now = " ".join(f"{str(s).capitalize()}." for s in sorted(found, key=lambda s: -s.lost_s))
    return [
        Figure(
            "slowest",
            "Trainer ranks and servers by phase",
            f"Mean of the last {len(last)} steps. Of a rank, the seconds that it worked itself, those that it lost "
            "between its phases, and what it waited for others. Of a server, what a token took, waiting included.",
            "Equal rows.",
            f"A rank, or a server, that takes {TIMES:g} times as long as the median of the others, and more than "
            f"{SHARE:.0%} of the step longer, in {STEPS} of {WINDOW} steps: all others wait for it.",
            now or "Nobody is slow.",
            _table(last),
        )
    ]


def _table(records: Sequence[Mapping[str, Any]]) -> go.Figure:
    """A row each, the slowest first."""
    rows = [*_ranks(records), *_servers(records)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name, "") for row in rows] for name in names]
    table = go.Figure(go.Table(header={"values": names}, cells={"values": cells, "height": 24}))
    table.update_layout(margin={"l": 8, "r": 8, "t": 8, "b": 8}, height=60 + 26 * min(len(rows), 16), template=None)
    return table


def _ranks(records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The _ROWS with most seconds of their own."""
    sums: dict[int, dict[str, float]] = {}
    for record in records:
        for phase, by in record["ranks"].items():
            for rank, (own, waited) in enumerate(zip(by["own"], by["waited"], strict=True)):
                row = sums.setdefault(rank, {"waited": 0.0})
                row[phase] = row.get(phase, 0.0) + own
                row["waited"] += waited
    slowest = sorted(sums, key=lambda rank: sums[rank]["waited"] - sum(sums[rank].values()))[:_ROWS]
    n = len(records)
    return [
        {"who": f"trainer rank {rank}"}
        | {f"{phase}, s": f"{s / n:.3f}" for phase, s in sums[rank].items() if phase != "waited"}
        | {"waited for others, s": f"{sums[rank]['waited'] / n:.3f}"}
        for rank in slowest
    ]


def _servers(records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    sums: dict[str, list[float]] = {}
    for record in records:
        for server, own in record["servers"].items():
            both = sums.setdefault(server, [0.0, 0.0])
            both[0] += own["seconds"]
            both[1] += own["tokens"]
    sampled = {server: seconds / tokens for server, (seconds, tokens) in sums.items() if tokens}
    slowest = sorted(sampled, key=lambda server: -sampled[server])[:_ROWS]
    return [
        {"who": f"server {server}", f"{SAMPLING}, ms a token": f"{1e3 * sampled[server]:.3f}"} for server in slowest
    ]
