"""Who is slow: the trainer rank, or the server, that takes longer than its like, step after step.

A rank's own seconds are those in which it did not wait for others (`megatron_ext.collective_clock`). Between phases
all wait for the next call; who is later than the first of them has lost that time itself. A server's seconds are those
of its requests, by token. One is a straggler in a phase where in STEPS of the last WINDOW steps it took at least TIMES
as long as the median of the others, and more than SHARE of the step longer. A noisy core makes now this rank slow and
now that one; nobody is named for it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from pipeline.step import BETWEEN
from pipeline.types import Rollout

if TYPE_CHECKING:
    from pipeline.step import StepResult

TIMES, SHARE = 1.5, 0.05
WINDOW, STEPS = 5, 4

SAMPLING = "sampling"
"""The phase of the servers."""

Table = Mapping[str, Mapping[str, float]]
"""phase -> who -> seconds, or in `SAMPLING` a share."""


@dataclass(frozen=True)
class Straggler:
    """who: "trainer rank 3" or "server 1". times: as long as the median of the others; lost_s: seconds a step, longer
    than that. Both are medians over the steps in which it was slow."""

    who: str
    phase: str
    times: float
    lost_s: float

    def __str__(self) -> str:
        phase = f"its own work with what it does {BETWEEN} phases" if self.phase == BETWEEN else self.phase
        return (
            f"{self.who} is slow: {phase} takes it {self.times:.1f} times as long as the others, {self.lost_s:.2g}"
            f" s more a step, in {STEPS} of the last {WINDOW} steps"
        )


def rank_seconds(ranks: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, dict[str, list[float]]]:
    """phase -> {own, waited}: [ranks] seconds each; between phases, those more than the rank that had fewest."""

    def column(phase: str, k: int) -> list[float]:
        return [round(rank.get(phase, (0.0, 0.0))[k], 4) for rank in ranks]

    phases = dict.fromkeys(phase for rank in ranks for phase in rank)
    found = {phase: {"own": column(phase, 0), "waited": column(phase, 1)} for phase in phases}
    if BETWEEN in found:
        early = [_early(found, rank) for rank in range(len(ranks))]
        late = [s - e for s, e in zip(found[BETWEEN]["own"], early, strict=True)]
        found[BETWEEN]["own"] = [round(s - min(late), 4) for s in late]
    return found


def _early(found: Mapping[str, Mapping[str, Sequence[float]]], rank: int) -> float:
    """Seconds that it was done before the slowest rank, in phases at whose end no rank waits for another."""
    apart = [by["own"] for phase, by in found.items() if phase != BETWEEN and not any(by["waited"]) and all(by["own"])]
    return sum(max(own) - own[rank] for own in apart)


def server_seconds(rollouts: Sequence[Rollout]) -> dict[str, dict[str, float]]:
    """server -> {tokens, seconds} of the rollouts that it sampled alone."""
    out: dict[str, dict[str, float]] = {}
    for rollout in rollouts:
        if len(rollout.servers) == 1:
            own = out.setdefault(str(rollout.servers[0]), {"tokens": 0.0, "seconds": 0.0})
            own["tokens"] += rollout.trained_tokens
            own["seconds"] = round(own["seconds"] + rollout.seconds, 4)
    return out


def table_of(ranks: Mapping[str, Mapping[str, Sequence[float]]], servers: Mapping[str, Mapping[str, float]]) -> Table:
    """Of a record, what can be held against each other: of ranks their own seconds, of those that have the phase, in
    the transfer senders (sync) apart from the others (gather); between phases, what they lost there beside the usual
    work of a step; of servers the seconds that a token of theirs took, in those of the slowest, which a step's rollout
    ends with."""
    table = {phase: _of_ranks(by) for phase, by in ranks.items()}
    if BETWEEN in table:
        work = [sum(own) for own in zip(*(by["own"] for phase, by in ranks.items() if phase != BETWEEN), strict=True)]
        lost = ranks[BETWEEN]["own"]
        table[BETWEEN] = {f"trainer rank {i}": s + median(work or [0.0]) for i, s in enumerate(lost)}
    paces = {f"server {n}": own["seconds"] / own["tokens"] for n, own in servers.items() if own["tokens"]}
    if (slowest := max(paces.values(), default=0.0)) > 0:
        table[SAMPLING] = {name: pace / slowest for name, pace in paces.items()}
    return table


def _of_ranks(by: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Own seconds of the ranks that took part in a phase."""
    both = enumerate(zip(by["own"], by["waited"], strict=True))
    return {f"trainer rank {i}": own for i, (own, waited) in both if own or waited}


class Stragglers:
    """Of a run. say: takes a line where one is found that was not known."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self._last: dict[tuple[str, str], deque[tuple[float, float]]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._known: set[tuple[str, str]] = set()

    def step(self, result: StepResult) -> dict[str, float]:
        """Take a finished step; its metrics, with who is slow where somebody is."""
        step_s = result.metrics.get("time/step_s", 0.0)
        table = table_of(rank_seconds(result.ranks), server_seconds(result.batch.rollouts))
        found = self.hear(table, step_s, result.metrics.get("time/rollout_s", step_s))
        for straggler in found:
            if (straggler.who, straggler.phase) not in self._known:
                self.say(f"step {result.batch.step}: {straggler}")
        self._known = {(s.who, s.phase) for s in found}
        worst = {s.who.rpartition(" ")[0]: s for s in sorted(found, key=lambda s: s.lost_s)}
        out: dict[str, float] = {}
        for kind, straggler in worst.items():
            name = f"straggler/{kind.split()[-1]}"
            out |= {
                name: float(straggler.who.rpartition(" ")[2]),
                f"{name}_times": straggler.times,
                f"{name}_lost_s": straggler.lost_s,
            }
        return out

    def hear(self, table: Table, step_s: float, rollout_s: float) -> list[Straggler]:
        """A step's table, the seconds that it took, and those in which servers sampled for it."""
        found = []
        for phase, by_who in table.items():
            for who, seconds in by_who.items():
                others = [s for other, s in by_who.items() if other != who]
                if not others:
                    continue
                usual = median(others)
                more = (seconds - usual) * (rollout_s if phase == SAMPLING else 1.0)
                last = self._last[who, phase]
                last.append((seconds / max(usual, 1e-6), more))
                slow = [(t, m) for t, m in last if t >= TIMES and m >= SHARE * step_s]
                if len(slow) >= STEPS:
                    times, lost = (median(values) for values in zip(*slow, strict=True))
                    found.append(Straggler(who, phase, times, lost))
        return found
