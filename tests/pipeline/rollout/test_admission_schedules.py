"""The rule of asynchronous rollouts on a thousand schedules without an engine, and broken on purpose."""

import heapq
import json
import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.rollout.admission import Admission


@dataclass(frozen=True)
class Schedule:
    """One run to be simulated. prompts: of the data; None: more than the run takes. faults: how often a server dies or
    the run is resumed, a unit of time."""

    groups: int
    staleness: int
    ahead: int
    order: str = "finish"
    steps: int = 8
    prompts: int | None = None
    dropped: float = 0.0
    failed: float = 0.0
    faults: float = 0.0
    places: int = 1000
    seed: int = 0


schedules = st.integers(0, 5).flatmap(
    lambda staleness: st.builds(
        Schedule,
        groups=st.integers(1, 5),
        staleness=st.just(staleness),
        ahead=st.integers(0, staleness),
        order=st.sampled_from(["finish", "admission"]),
        steps=st.integers(1, 10),
        prompts=st.none() | st.integers(0, 40),
        dropped=st.sampled_from([0.0, 0.3, 0.8]),
        failed=st.sampled_from([0.0, 0.1]),
        faults=st.sampled_from([0.0, 0.3]),
        places=st.sampled_from([1, 3, 1000]),
        seed=st.integers(0, 2**32),
    )
)


class Run:
    """A run in virtual time: servers with places, a trainer, and what goes wrong; `go` checks all that is promised.

    A group's tokens are of the versions that the servers held from its start in a place on; it may wait for one.
    """

    def __init__(self, schedule: Schedule, rule: type[Admission]):
        self.schedule, self.rule, self.random = schedule, rule, random.Random(schedule.seed)
        self.admission = self.new(version=3)
        self.first = self.admission.version
        self.now, self.cursor, self.trains_until = 0.0, 0, None
        self.queue: list[int] = []
        self.running: list[tuple[float, int]] = []
        self.began: dict[int, int] = {}
        self.ends: Counter[int] = Counter()
        self.batches: list[list[int]] = []

    def new(self, version):
        s = self.schedule
        return self.rule(
            s.groups, s.staleness, s.ahead, order=s.order, version=version, last=3 + s.steps - 1
        )  # fmt: skip

    def go(self):
        for _ in range(100_000):
            self.fill()
            if self.trains_until is None and not self.admission.over and self.admission.ready() is not None:
                self.take()
            elif self.admission.over and self.trains_until is None:
                break
            else:
                self.next_event()
        else:
            raise AssertionError("the run does not end")
        self.check_ends()

    def fill(self):
        """Admit while there is room; begin while there are places."""
        a, s = self.admission, self.schedule
        while a.room:
            if s.prompts is not None and self.cursor == s.prompts:
                a.exhaust()
                break
            a.admit(self.cursor)
            self.queue.append(self.cursor)
            self.cursor += 1
        while self.queue and len(self.running) < s.places:
            index = self.queue.pop(0)
            self.began[index] = a.version
            heapq.heappush(self.running, (self.now + self.random.paretovariate(1.1), index))
        due = Counter(a.due(i) for i in a.waiting)
        assert due.get(a.version + (self.trains_until is not None), 0) <= s.groups, f"{due} at {a.version}"
        assert len(a.open) <= (s.ahead + 1) * s.groups

    def take(self):
        a = self.admission
        batch = a.take()
        assert len(batch) == self.schedule.groups or a.exhausted
        assert len(set(batch)) == len(batch)
        for index in batch:
            assert index in self.began, "taken before it was sampled"
            assert a.version - self.began[index] <= self.schedule.staleness, "older than the bound"
            assert all(index != other for _, other in self.running), "taken while it is sampled"
            self.ends[index] += 1
        if self.schedule.order == "admission":
            assert batch == sorted(batch)
            assert not self.batches or batch[0] > self.batches[-1][-1]
        self.batches.append(batch)
        self.trains_until = self.now + self.random.uniform(0.1, 5)

    def next_event(self):
        """The end of a group or of a step, whichever is first; now and then a fault before it."""
        end = self.running[0][0] if self.running else None
        times = [t for t in (end, self.trains_until) if t is not None]
        assert times, f"nothing can happen any more: {self.admission.state()}"
        if self.random.random() < self.schedule.faults:
            self.fault()
            return
        self.now = min(times)
        if self.now == self.trains_until:
            self.transfer()
        else:
            self.group_ends(heapq.heappop(self.running)[1])

    def group_ends(self, index):
        draw = self.random.random()
        if draw < self.schedule.failed:
            self.dropped(index, "failed")
        elif draw < self.schedule.failed + self.schedule.dropped:
            self.dropped(index, "uninformative")
        else:
            self.admission.finish(index, self.began[index])

    def dropped(self, index, how):
        self.admission.drop(index, how)
        self.ends[index] += 1

    def transfer(self):
        self.trains_until = None
        version = self.admission.transferred()
        for index in self.queue:  # no token yet
            self.admission.renew(index, version)

    def fault(self):
        """A server dies: some running groups are sampled anew. Or the run ends and is resumed between two steps."""
        if self.random.random() < 0.5:
            lost = [entry for entry in self.running if self.random.random() < 0.5]
            self.running = [entry for entry in self.running if entry not in lost]
            heapq.heapify(self.running)
            for _, index in lost:
                self.admission.renew(index, self.admission.version)
                self.queue.append(index)
        elif self.trains_until is None:
            before = self.admission
            self.admission = self.new(version=0)
            self.admission.restore(json.loads(json.dumps(before.state())))
            assert self.admission.state() == before.state()
            for _, index in self.running:  # what was in flight is gone
                self.admission.renew(index, self.admission.version)
                self.queue.append(index)
            self.running = []

    def check_ends(self):
        s, a = self.schedule, self.admission
        assert not a.open, "an admitted prompt did not end"
        assert self.ends == Counter(range(self.cursor)), "a prompt ended twice or never"
        assert a.ended.total() == self.cursor
        assert a.ended["trained"] == sum(map(len, self.batches))
        assert all(len(batch) == s.groups for batch in self.batches[:-1])
        if not a.exhausted:
            assert len(self.batches) == s.steps
            assert a.ended["trained"] == s.steps * s.groups


@settings(max_examples=700, deadline=None, suppress_health_check=list(HealthCheck))
@given(schedules)
def test_nothing_is_late_lost_or_stuck_on_any_schedule(schedule):
    for seed in range(schedule.seed, schedule.seed + 2):  # to draw one costs more than to run another
        Run(replace(schedule, seed=seed), Admission).go()


class NoLookAhead(Admission):
    """Takes what has finished and is due, whatever that leaves for later."""

    def _late(self, taken):
        late = super()._late(taken)
        return late if taken and late is not None and late <= self.version else None


class OneVersionMore(Admission):
    """A group may stay one version longer."""

    def due(self, index):
        return super().due(index) + 1

    def _late(self, taken):
        self.staleness += 1
        try:
            return super()._late(taken)
        finally:
            self.staleness -= 1


class OneGroupMore(Admission):
    """One place too many."""

    @property
    def room(self):
        return super().room + (not self.exhausted and self.last >= self._next_step)


class EndsAtTheTake(Admission):
    """The places of a step's groups are free when it begins, not when it has been trained."""

    @property
    def room(self):
        return super().room + len(self.training)


class LosesFinished(Admission):
    """A finished group is forgotten now and then."""

    def finish(self, index, oldest=None):
        super().finish(index, oldest)
        if index % 7 == 5:
            self._waiting.subtract([self.open.pop(index).oldest])


class FinishesTwice(Admission):
    """A group that a step has taken stays in the buffer."""

    def transferred(self):
        kept = {index: self.open[index] for index in self.training[:1]}
        version = super().transferred()
        self.open |= kept
        self._waiting.update(group.oldest for group in kept.values())
        return version


@pytest.mark.parametrize(
    "broken", [NoLookAhead, OneVersionMore, OneGroupMore, EndsAtTheTake, LosesFinished, FinishesTwice]
)
def test_a_rule_that_is_broken_on_purpose_is_seen(broken):
    for seed in range(300):
        staleness = 1 + seed % 4
        schedule = Schedule(2, staleness, max(1, staleness - seed % 2), steps=10, seed=seed)
        try:
            Run(schedule, broken).go()
        except AssertionError:
            return
    pytest.fail(f"{broken.__name__} broke nothing that is looked at")
