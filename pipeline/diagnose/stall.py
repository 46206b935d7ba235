"""When a run stands still: where every process is, in a file, and the one that everybody waits for, in a sentence.

stalls/stall_001.txt of the run directory begins with the sentence. Then come the stacks of every trainer rank, of every
process of every server, and of the controller.
"""

from __future__ import annotations

import faulthandler
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.cluster.placement import on_node
from pipeline.cluster.stacks import ProcessStacks, stacks_of
from pipeline.diagnose.awaited import Seen, sentence
from pipeline.engine.fleet import Fleet
from pipeline.engine.server import ServerError
from pipeline.trainer.group import TrainerGroup

FOLDER = "stalls"
_ANSWER_S = 60.0  # of a node


class StallReports:
    """Those of a run. places: of each rank, `TrainerGroup.where`, asked while they answered."""

    def __init__(self, directory: Path, places: Sequence[dict[str, Any]], fleet: Fleet, say: Callable[[str], None]):
        self.folder, self.places, self.fleet, self.say = directory / FOLDER, places, fleet, say

    @classmethod
    def of_run(cls, directory: Path, trainers: TrainerGroup, fleet: Fleet, say: Callable[[str], None]) -> StallReports:
        """While all ranks answer."""
        return cls(directory, trainers.where(), fleet, say)

    def __call__(self, what: str, seconds: float) -> None:
        """A wait for `what` has lasted so long: write the file and say the sentence."""
        seen = [*self._ranks(), *self._servers()]
        words = f"no progress in {what} for {seconds:.0f} s: {sentence(seen)}"
        parts = [words, *(f"== {one.who}{one.about}\n{_text(one.processes)}" for one in seen)]
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"stall_{1 + len(list(self.folder.glob('stall_*.txt'))):03d}.txt"
        file.write_text("\n\n".join([*parts, f"== controller\n{_own_stacks()}"]) + "\n", encoding="utf-8")
        self.say(f"{words} (stacks: {file})")

    def _ranks(self) -> list[Seen]:
        asked: dict[str, list[dict[str, Any]]] = {}
        for place in self.places:
            asked.setdefault(place["node"], []).append(place)
        here = ray.get_runtime_context().get_node_id()
        reader: Any = ray.remote(num_cpus=0, max_retries=0)(stacks_of)
        calls = {
            node: reader.options(**on_node(node)).remote([p["pid"] for p in places])
            for node, places in asked.items()
            if node != here
        }
        found = {}
        for node, places in asked.items():
            stacks = stacks_of([p["pid"] for p in places]) if node == here else _answer(calls[node], places)
            found |= {p["rank"]: one for p, one in zip(places, stacks, strict=True)}
        return [
            Seen(f"trainer rank {p['rank']}", (found[p["rank"]],), f", {p['host']}")
            for p in sorted(self.places, key=lambda p: p["rank"])
        ]

    def _servers(self) -> list[Seen]:
        seen = []
        for number, server in enumerate(self.fleet.servers):
            try:
                processes = tuple(server.process.stacks())
            except ServerError as error:  # its node is gone
                processes = (ProcessStacks(0, "gone", "", problem=str(error)),)
            about = f", {server.process.url}, {server.in_flight} requests in flight"
            seen.append(Seen(f"server {number}", processes, about, server.in_flight))
        return seen


def _answer(call: Any, places: Sequence[dict[str, Any]]) -> Sequence[ProcessStacks]:
    """Of a node; one that does not answer is part of the finding."""
    done, _ = ray.wait([call], timeout=_ANSWER_S)
    try:
        if done:
            return ray.get(done[0])
        why = f"its node did not answer in {_ANSWER_S:g} s"
    except RayError as error:
        why = f"its node: {str(error)[-300:]}"
    return [ProcessStacks(place["pid"], "unknown", "", problem=why) for place in places]


def _text(processes: Sequence[ProcessStacks]) -> str:
    return "\n".join(map(str, processes))


def _own_stacks() -> str:
    """Of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
