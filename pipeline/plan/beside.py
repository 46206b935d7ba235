"""Sampling beside training, followed event by event under the rule of a run: `pipeline.rollout.admission.Admission`.

Servers decode as `sampling.generate` says; a group is a prompt with its answers on one server, the one with the fewest.
The trainer takes a step's groups when the rule has them ready, trains for a fixed time, and sends weights while the
servers stand still; what they were at goes on afterwards. Graders take no time, and nothing fails.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.plan.sampling import Server
from pipeline.rollout.admission import Admission

_WARM = 2  # steps more than the staleness that are left out of the figures: servers begin empty


@dataclass(frozen=True)
class Pace:
    """Of the steps that were followed. seconds: of one. trainer, servers: shares of it in which the trainer works, and
    of the places of the servers that hold a sequence. lag: mean version of a token behind the step that trains on it,
    as if it were all of the version at its group's start."""

    seconds: float
    trainer: float
    servers: float
    lag: float


@dataclass
class _Place:
    """A server that decodes. step: of its decoding, so far, at the time `now`; nothing happens before `free`, because
    of a prefill or a transfer."""

    one: Server
    prompt: float
    step: float = 0.0
    now: float = 0.0
    held: float = 0.0
    starts: float = 0.0
    running: list[tuple[float, float, int]] = field(default_factory=list)
    queue: deque[tuple[float, int]] = field(default_factory=deque)
    next_end: float = math.inf
    pace: float = 1.0

    @property
    def load(self) -> int:
        return len(self.running) + len(self.queue)

    @property
    def step_s(self) -> float:
        """Seconds of a step until the next end."""
        batch = len(self.running)
        return self.one.step_s(batch, self.prompt + (self.step + self.running[0][0]) / 2 - self.starts / batch)

    def look_ahead(self) -> None:
        """After any change: when the next answer ends."""
        self.next_end = math.inf
        if self.running:
            self.pace = self.step_s
            self.next_end = self.now + (self.running[0][0] - self.step) * self.pace

    def advance(self, to: float) -> None:
        """Decode until `to`, which is no later than the next end."""
        if to <= self.now:
            return
        if self.running:
            self.step = min(self.running[0][0], self.step + (to - self.now) / self.pace)
            self.held += (to - self.now) * len(self.running)
        self.now = to

    def start(self) -> None:
        """Answers that wait take the places that are free, each after its prompt's prefill."""
        while self.queue and len(self.running) < self.one.sequences:
            length, index = self.queue.popleft()
            heapq.heappush(self.running, (self.step + length, self.step, index))
            self.starts += self.step
            self.now += self.one.prefill_s(self.prompt)
        self.look_ahead()

    def end(self) -> list[int]:
        """Groups whose answers end now."""
        self.step, done = self.running[0][0], []
        while self.running and self.running[0][0] <= self.step:
            _, began, index = heapq.heappop(self.running)
            self.starts -= began
            done.append(index)
        return done


class _Beside:
    """One run of it."""

    def __init__(self, lengths: np.ndarray, rule: Admission, servers: int, one: Server, prompt: float):
        self.lengths, self.rule = lengths, rule
        self.places = [_Place(one, prompt) for _ in range(servers)]
        self.left: dict[int, int] = {}
        self.began: dict[int, int] = {}
        self.cursor, self.now = 0, 0.0

    def fill(self) -> None:
        """Admit what the rule has room for."""
        for _ in range(self.rule.room):
            index, own = self.cursor, self.lengths[self.cursor % len(self.lengths)]
            self.cursor += 1
            self.rule.admit(index)
            self.left[index], self.began[index] = len(own), self.rule.version
            place = min(self.places, key=lambda p: p.load)
            place.advance(self.now)
            place.queue.extend((float(length), index) for length in own)
            place.start()

    def until(self, time: float) -> None:
        """Decode until a time."""
        while (place := min(self.places, key=lambda p: p.next_end)).next_end <= time:
            self._end(place)
        self.now = time
        for place in self.places:
            place.advance(time)
            place.look_ahead()

    def until_ready(self) -> list[int]:
        """Decode until the rule has a step ready."""
        while self.rule.ready() is None:
            while not self._end(min(self.places, key=lambda p: p.next_end)):
                pass
        return self.rule.take()

    def _end(self, place: _Place) -> bool:
        """The next end of an answer on a server. Whether a group is finished by it."""
        finished = False
        self.now = place.next_end
        place.advance(self.now)
        for index in place.end():
            self.left[index] -= 1
            if not self.left[index]:
                self.rule.finish(index)
                finished = True
        place.start()
        return finished


def follow(
    lengths: Sequence[Sequence[float]] | np.ndarray,
    rule: Admission,
    servers: int,
    one: Server,
    prompt: float,
    *,
    train_s: float,
    sync_s: float,
    steps: int,
) -> Pace:
    """lengths: [groups, answers] tokens, taken again from the first when all have been. rule: at its beginning.
    steps: that are measured, after some that are not."""
    beside = _Beside(np.asarray(lengths), rule, servers, one, prompt)
    warm, lags, began, held = _WARM + rule.staleness, [], 0.0, 0.0
    for number in range(warm + steps):
        if number == warm:
            began, held = beside.now, sum(p.held for p in beside.places)
        beside.fill()
        taken = beside.until_ready()
        if number >= warm:
            lags += [rule.version - beside.began.pop(index) for index in taken]
        beside.until(beside.now + train_s)
        beside.now += sync_s
        for place in beside.places:
            place.now = max(place.now, beside.now)
            place.look_ahead()
        rule.transferred()
    seconds = (beside.now - began) / steps
    most = min(one.sequences, (rule.ahead + 1) * rule.groups * beside.lengths.shape[1] / servers)
    busy = (sum(p.held for p in beside.places) - held) / (steps * seconds * servers * most)
    return Pace(seconds, train_s / seconds, busy, float(np.mean(lags)))
