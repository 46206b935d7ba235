"""Which prompts may be sampled, and which finished groups a step takes: staleness held by admission, never by discard.

A version is the number of transfers so far, and step v is the one that trains while the servers hold version v. With B
groups a step, `staleness` s and `ahead` a <= s:

- A group is open from its admission to its end, and it ends once: trained, uninformative or failed. Groups are admitted
  while fewer than (a + 1) B are open; each end frees one place. A group that a step trains on ends with the transfer.
- A group is due at step (version of its oldest token) + s: trained there, its oldest token is s versions behind.
- Step v takes B finished groups, those due first in front, then in the order of admission, but only if what it leaves
  can still be trained in time: for every j >= 0, at most (j + 1) B of that are due by step v + 1 + j. Else it waits for
  older groups in place of taking newer ones.

So never more than B groups are due at a step, and the bound holds: admission at version v adds groups that are due s
steps later, by when (s + 1) B places in batches, s B of them behind a step in progress, are there for the at most
(a + 1) B open groups. Nothing is ever dropped for its age.

This is the rule alone, as a state machine without clock, engine or thread: the producer of a run, its simulation and
its tests all use this class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.config.run import Order

End = Literal["trained", "uninformative", "failed", "unused"]
"""How a group ends. unused: the run was over before a step could take it."""


@dataclass
class OpenGroup:
    """A group between admission and end.

    number: of its admission, counted up from 0. oldest: version before which none of its tokens was sampled.
    finished: every answer is sampled and graded.
    """

    number: int
    oldest: int
    finished: bool = False


class Admission:
    """The rule, and the open groups by the index of their prompts."""

    def __init__(
        self,
        groups: int,
        staleness: int,
        ahead: int,
        *,
        order: Order = "finish",
        version: int = 0,
        last: int | None = None,
    ):
        """groups: B, of a step. order: admission takes strictly in the order of the prompts. version: that the servers
        hold. last: version of the run's last step, beyond which no group is admitted; None: there is no last one.
        Raises ValueError for ahead > staleness."""
        if not (groups >= 1 and 0 <= ahead <= staleness):
            raise ValueError(f"{groups} groups a step, ahead {ahead} of staleness {staleness}: 0 <= ahead <= staleness")
        self.groups, self.staleness, self.ahead, self.order = groups, staleness, ahead, order
        self.version, self.last = version, last
        self.exhausted = False
        self.open: dict[int, OpenGroup] = {}
        """In the order of admission."""
        self.training: list[int] = []
        """Those of them that the step in progress trains on, in its order."""
        self.ended: Counter[End] = Counter()
        self.dropped_in_a_row = 0
        """Groups that ended without being trained on since one last finished."""
        self._admitted = 0
        self._waiting: Counter[int] = Counter()
        """Open groups that no step has taken, by `oldest`."""

    # What may be asked

    @property
    def room(self) -> int:
        """So many groups may be admitted now."""
        if self.exhausted:
            return 0
        most = (self.ahead + 1) * self.groups - len(self.open)
        if self.last is not None:
            steps = self.last - self._next_step + 1
            most = min(most, steps * self.groups - self._waiting.total())
        return max(0, most)

    @property
    def waiting(self) -> list[int]:
        """Open groups that no step has taken, in the order of admission."""
        taken = set(self.training)
        return [index for index in self.open if index not in taken]

    @property
    def unfinished(self) -> list[int]:
        """Open groups that are being sampled or graded, in the order of admission."""
        return [index for index, group in self.open.items() if not group.finished]

    @property
    def over(self) -> bool:
        """Whether no step is left: the data is at its end, or the last step was made."""
        done = self.last is not None and self.version > self.last
        return done or (self.exhausted and not self.open)

    def due(self, index: int) -> int:
        """The last step that may train on a group."""
        return self.open[index].oldest + self.staleness

    def ready(self) -> list[int] | None:
        """The groups that the step at this version would take now; None: it has to wait. Fewer than B only at the end
        of the data."""
        chosen = self._candidates()
        if len(chosen) < self.groups and (not self.exhausted or self.unfinished or not chosen):
            return None
        if not all(self.open[index].finished for index in chosen):
            return None
        return chosen if self._late(chosen) is None else None

    def waits_for(self) -> list[int]:
        """The unfinished groups that keep a step from being ready: any of them, where it only lacks groups; those that
        are due too soon to be left, where it has enough. Empty where it is ready or nothing is open."""
        chosen = self._candidates()
        if self.order == "admission":
            return [index for index in chosen if not self.open[index].finished]
        late = self._late(chosen)
        if late is None and len(chosen) == self.groups:
            return []
        return [index for index in self.unfinished if late is None or self.due(index) <= late]

    # What happens

    def admit(self, index: int) -> None:
        """A prompt is admitted; its first token may come from the version that the servers hold now."""
        assert self.room > 0, "no place is free"
        assert index not in self.open, f"prompt {index} is open already"
        self.open[index] = OpenGroup(self._admitted, self.version)
        self._waiting[self.version] += 1
        self._admitted += 1
        self._check()

    def exhaust(self) -> None:
        """There are no more prompts."""
        self.exhausted = True

    def renew(self, index: int, oldest: int) -> None:
        """Nothing in an open group is older than `oldest`: no token had been sampled at a transfer, or its answers are
        sampled anew. In the order of admission groups stay due in that order."""
        group = self.open[index]
        assert group.oldest <= oldest <= self.version, f"prompt {index} is of {group.oldest}, not {oldest}"
        if self.order == "finish":
            self._waiting.subtract([group.oldest])
            group.oldest = oldest
            self._waiting[oldest] += 1

    def finish(self, index: int, oldest: int | None = None) -> None:
        """A group is sampled and graded and can be trained on. oldest: version of its oldest token."""
        group = self.open[index]
        assert not group.finished, f"prompt {index} finished twice"
        self.renew(index, group.oldest if oldest is None else oldest)
        group.finished = True
        self.dropped_in_a_row = 0

    def drop(self, index: int, end: Literal["uninformative", "failed", "unused"]) -> None:
        """A group ends that no step trains on."""
        assert index not in self.training, f"prompt {index} is being trained on"
        self._waiting.subtract([self.open.pop(index).oldest])
        self.ended[end] += 1
        self.dropped_in_a_row += 1

    def take(self) -> list[int]:
        """The step at this version begins: the groups it trains on, which `ready` named."""
        assert not self.training, "a step is in progress"
        chosen = self.ready()
        assert chosen is not None, "no step is ready"
        self.training = chosen
        self._waiting.subtract(self.open[index].oldest for index in chosen)
        self._check()
        return list(chosen)

    def transferred(self) -> int:
        """The step in progress is trained, and the servers hold the next version, which is returned."""
        assert self.training, "no step is in progress"
        for index in self.training:
            del self.open[index]
        self.ended["trained"] += len(self.training)
        self.training = []
        self.version += 1
        self._check()
        return self.version

    # Checkpoints

    def state(self) -> dict[str, Any]:
        """Everything but the settings; JSON can hold it. Only between two steps."""
        assert not self.training, "a step is in progress"
        return {
            "version": self.version,
            "admitted": self._admitted,
            "exhausted": self.exhausted,
            "ended": dict(self.ended),
            "dropped_in_a_row": self.dropped_in_a_row,
            "open": [[index, asdict(group)] for index, group in self.open.items()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError where what was open then cannot be trained in time: with a
        smaller staleness, or fewer groups a step."""
        self.version, self._admitted = state["version"], state["admitted"]
        self.exhausted, self.dropped_in_a_row = state["exhausted"], state["dropped_in_a_row"]
        self.ended = Counter(state["ended"])
        self.open = {index: OpenGroup(**group) for index, group in state["open"]}
        self._waiting = Counter(group.oldest for group in self.open.values())
        if self._late(()) is not None:
            raise ValueError(
                f"{len(self.open)} open groups cannot be trained within {self.staleness} versions, {self.groups} a step"
            )

    # The rule

    @property
    def _next_step(self) -> int:
        """The step that takes groups next."""
        return self.version + bool(self.training)

    def _candidates(self) -> list[int]:
        """The groups that a step would take next; in the order of admission they may be unfinished."""
        if self.order == "admission":
            return self.waiting[: self.groups]
        finished = [index for index in self.waiting if self.open[index].finished]
        return sorted(finished, key=lambda index: (self.open[index].oldest, self.open[index].number))[: self.groups]

    def _late(self, taken: Sequence[int]) -> int | None:
        """The first step by which more is due than the steps up to it take; None where all goes well. taken: by the
        next step."""
        left = self._waiting - Counter(self.open[index].oldest for index in taken)
        step = self._next_step + bool(taken)
        count = 0
        for oldest in sorted(left):
            count += left[oldest]
            due = oldest + self.staleness
            if count > max(0, due - step + 1) * self.groups:
                return due
        return None

    def _check(self) -> None:
        late = self._late(())
        assert late is None, f"more than {self.groups} groups a step are due by step {late}"
