"""Which rank sends what, so that all senders have about the same bytes. Every rank computes the same from the same.

Dense parameters of a pipeline stage go to any sender of that stage: each of its ranks is in a tensor-parallel group
that holds them whole. Experts go to a sender that holds them, where each expert-parallel rank of the stage has one;
else to any sender of the stage, which gathers them. What a stage without a sender holds goes to any sender, by way of
the stage's first rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a rank stands: its pipeline stage, and its number among the expert-parallel ranks."""

    rank: int
    stage: int
    expert: int


@dataclass(frozen=True)
class Unit:
    """Parameters of a stage that one rank sends.

    items: their numbers within the stage. nbytes: of their whole tensors. expert: the only expert-parallel rank that
    sends them; None: any rank of the stage does.
    """

    stage: int
    items: tuple[int, ...]
    nbytes: int
    expert: int | None = None


def choose_senders(places: Sequence[Place], limit: int) -> list[int]:
    """At most `limit` ranks, rank 0 first: one of each stage, of each expert-parallel rank there, then replicas."""
    alike, order = Counter[tuple[int, int]](), []
    for place in sorted(places, key=lambda p: p.rank):
        order.append((alike[place.stage, place.expert], place.expert, place.stage, place.rank))
        alike[place.stage, place.expert] += 1
    return [rank for *_, rank in sorted(order)[:limit]]


def holds_its_own(stage: int, places: Sequence[Place], senders: Sequence[int]) -> bool:
    """Whether each expert-parallel rank of a stage has a sender."""
    here = [p for p in places if p.stage == stage]
    return {p.expert for p in here} == {p.expert for p in here if p.rank in senders}


def assign(units: Sequence[Unit], places: Sequence[Place], senders: Sequence[int]) -> dict[int, list[Unit]]:
    """sender -> what it sends, in the order of `units`: each exactly once.

    What fewest can send is given out first, the largest first, each to the sender that has least so far.
    """
    standing = {p.rank: p for p in places}

    def able(unit: Unit) -> list[int]:
        here = [s for s in senders if standing[s].stage == unit.stage]
        return [s for s in here if unit.expert in (None, standing[s].expert)] or list(senders)

    choices = {key: able(Unit(key[0], (), 0, key[1])) for key in {(u.stage, u.expert) for u in units}}
    order = sorted(
        range(len(units)), key=lambda n: (len(choices[units[n].stage, units[n].expert]), -units[n].nbytes, n)
    )
    load, owner = dict.fromkeys(senders, 0), dict[int, int]()
    for number in order:
        unit = units[number]
        owner[number] = min(choices[unit.stage, unit.expert], key=lambda s: load[s])
        load[owner[number]] += unit.nbytes
    return {s: [unit for number, unit in enumerate(units) if owner[number] == s] for s in senders}
