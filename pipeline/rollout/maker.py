"""Groups, from the admission of a prompt to the end of the group, on one event loop.

    admit -> sample (a task an answer) -> grade (as each answer ends) -> finished groups -> a step

Everything here runs on that loop's thread, one thing at a time; `producer` is how another thread uses it. Any error of
a sample or a verifier is kept and raised to whoever waits for groups.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, cast

import numpy as np

from pipeline.config.rewards import OnFailure
from pipeline.engine.decoder import AnswerError
from pipeline.engine.sampling import Sampling
from pipeline.errors import SamerouteError
from pipeline.rewards import Failures, RewardError, Verdict, settle
from pipeline.rollout.admission import Admission
from pipeline.rollout.answers import Answer, Answers, Scored
from pipeline.rollout.grading import Judge
from pipeline.rollout.sampler import all_or_none
from pipeline.rollout.saved import Saved
from pipeline.rollout.tally import Tally
from pipeline.rollout.teacher import Teacher
from pipeline.types import Ended, Episode, Group, Prompt, Rollout


class NothingToLearnError(SamerouteError):
    """Dynamic sampling found too few groups whose rewards differ."""


class Prompts(Protocol):
    """What of a PromptSource is needed here."""

    def take(self, n: int) -> list[Prompt]: ...
    def learned(self, prompt: Prompt, rewards: np.ndarray) -> None: ...
    def metrics(self) -> dict[str, float]: ...
    def state(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Recipe:
    """What a group is made of, and whether it counts.

    samples:      answers of a prompt.  sampling: how they are drawn.
    informative:  whether a graded group has something to teach; None: all do.
    on_failure, least: of answers that cannot be graded, see `grade`.
    most_dropped: groups in a row that may end without being trained on.
    scored:       rollouts that each server scores after a transfer.
    limit_s:      seconds without any progress of what a step waits for, after which it is cut.
    """

    samples: int
    sampling: Sampling
    informative: Callable[[Group], bool] | None
    on_failure: OnFailure
    least: int
    most_dropped: int
    scored: int
    limit_s: float

    def settle(self, group: Group, verdicts: Sequence[Verdict]) -> tuple[Group, Failures]:
        """See `rewards.settle`."""
        return settle(group, verdicts, on_failure=self.on_failure, least=self.least)


@dataclass
class Making:
    """A group on its way.

    episodes, verdicts: by sample; None: not there yet.  lost: samples that were cut before their first token.
    begun: of answers that a checkpoint had a part of, that part.
    moved: when an answer of it was last sampled to its end or graded, seconds of time.monotonic().
    """

    prompt: Prompt
    episodes: list[Episode | None]
    verdicts: list[Verdict | None]
    moved: float
    lost: set[int] = field(default_factory=set)
    begun: dict[int, Rollout] = field(default_factory=dict)
    answers: dict[int, Answer] = field(default_factory=dict)

    @property
    def sampled(self) -> dict[int, Episode]:
        """Whole answers."""
        return {number: episode for number, episode in enumerate(self.episodes) if episode is not None}

    @property
    def so_far(self) -> dict[int, Rollout]:
        """Whole answers, and the parts that are known of others, which have finish_reason "abort". What an environment
        made is not among them: nobody else could grade it, so it is made again."""
        parts = {number: a.rollout for number, a in self.answers.items() if a.rollout is not None}
        aborted = {number: dataclasses.replace(r, finish_reason="abort") for number, r in parts.items()}
        return self.begun | aborted | {n: e.last for n, e in self.sampled.items() if e.verdict is None}

    @property
    def last_move(self) -> float:
        """When it last got further, by a token at least; seconds of time.monotonic()."""
        return max([self.moved, *(answer.moved for answer in self.answers.values())])

    @property
    def complete(self) -> bool:
        """Whether every answer is graded, or lost."""
        return all(v is not None or number in self.lost for number, v in enumerate(self.verdicts))


class Maker:
    """Makes groups as the admission allows. An async context: it begins on entering, and on leaving every task and
    request of it has ended."""

    def __init__(
        self,
        admission: Admission,
        prompts: Prompts,
        answers: Answers,
        judge: Judge,
        recipe: Recipe,
        teacher: Teacher | None = None,
    ):
        """teacher: scores each answer as it ends, while it is graded; None: nobody does."""
        self.admission, self.prompts, self.answers, self.judge = admission, prompts, answers, judge
        self.recipe, self.teacher = recipe, teacher
        self.making: dict[int, Making] = {}
        self.finished: dict[int, Group] = {}
        self.error: BaseException | None = None
        self.tally = Tally(time.monotonic())
        self._dropped: Counter[str] = Counter()
        self._ended: list[Ended] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._inside = contextlib.AsyncExitStack()
        self._paused = contextlib.AsyncExitStack()
        self._scoring: asyncio.Task[list[Scored]] | None = None

    async def __aenter__(self) -> Self:
        await self._inside.enter_async_context(self.answers)
        await self._inside.enter_async_context(self.judge)
        if self.teacher is not None:
            await self._inside.enter_async_context(self.teacher)
        for making in self.making.values():
            self._begin(making)
        self._fill()
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [*self._tasks, *([] if self._scoring is None else [self._scoring])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._paused.aclose()
        await self._inside.aclose()

    # What a trainer asks for

    async def take(self) -> tuple[list[Group], list[Scored]]:
        """The groups of the next step, when they are there, and sequences that the servers scored under the weights of
        that step; none where some of its own rollouts are of these weights alone. Raises the first error of any sample
        or verifier."""
        since = time.monotonic()
        while self._raise() or self.admission.ready() is None:
            self._changed.clear()
            due = self._last_move(since) + self.recipe.limit_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(0.0, due - time.monotonic()))
            if time.monotonic() >= self._last_move(since) + self.recipe.limit_s:
                self._cut()
                since = time.monotonic()
        groups = [await self._scored(self.finished.pop(index)) for index in self.admission.take()]
        rollouts, scoring = [r for group in groups for r in _trained(group)], self._scoring
        self._scoring = None
        if scoring is None and any(r.is_of(self.admission.version) for r in rollouts):
            return groups, []
        return groups, await (scoring or self.answers.score(rollouts, self.recipe.scored))

    async def pause(self) -> None:
        """Nothing runs on the servers until `resume`."""
        await self._paused.enter_async_context(self.answers.interrupted())
        self._look()

    async def resume(self, version: int) -> None:
        """The servers hold `version`, and the step in progress is trained."""
        held = self.admission.transferred()
        assert held == version, f"the servers hold version {version}, and step {held - 1} was trained"
        for index, making in self.making.items():
            if not making.sampled and not any(answer.begun for answer in making.answers.values()):
                self.admission.renew(index, version)
        ahead = [r for group in self.finished.values() for r in _trained(group)]
        if ahead:  # before anything new is sampled, in front of which it would have to queue
            self._scoring = asyncio.create_task(self.answers.score(ahead, self.recipe.scored))
            await asyncio.sleep(0)
        await self._paused.aclose()
        self._fill()

    async def snapshot(self) -> Saved:
        """What a checkpoint needs, between two steps."""
        open_ = {index: (making.prompt, making.so_far) for index, making in self.making.items()}
        return Saved(self.admission.state(), self.prompts.state(), dict(self.finished), open_, self.ended())

    def ended(self) -> list[Ended]:
        """Groups that ended untrained since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def restore(self, saved: Saved) -> None:
        """Go on where a checkpoint was saved; before it begins. Raises ValueError as `Admission.restore`."""
        self.admission.restore(saved.admission)
        self.finished = dict(saved.finished)
        for index in self.admission.unfinished:
            prompt, so_far = saved.open[index]
            making = self.making[index] = self._new(prompt)
            for number, rollout in so_far.items():
                if rollout.finish_reason == "abort":
                    making.begun[number] = rollout
                else:
                    making.episodes[number] = Episode((rollout,))
            self.admission.renew(index, _oldest(so_far.values(), self.admission.version))

    def metrics(self) -> tuple[dict[str, float], Failures]:
        """Of what happened since the last call, and of what is open now."""
        metrics, failures = self.tally.read(time.monotonic())
        lengths = [rollout.trained_tokens for making in self.making.values() for rollout in making.so_far.values()]
        metrics |= self.prompts.metrics() | ({} if self.teacher is None else self.teacher.metrics())
        metrics |= {"rollout/open_groups": float(len(self.making)), "rollout/buffer": float(len(self.finished))}
        if lengths:
            metrics["rollout/open_length_mean"] = float(np.mean(lengths))
        return metrics, failures

    # Groups

    def _new(self, prompt: Prompt) -> Making:
        n = self.recipe.samples
        return Making(prompt, [None] * n, [None] * n, time.monotonic())

    def _fill(self) -> None:
        """Admit what there is room for."""
        room = self.admission.room
        for prompt in self.prompts.take(room) if room else ():
            self.admission.admit(prompt.index)
            making = self.making[prompt.index] = self._new(prompt)
            self._begin(making)
        self._changed.set()

    def _begin(self, making: Making) -> None:
        for number in range(self.recipe.samples):
            task = asyncio.create_task(self._answer(making, number))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.error = self.error or error
            self._changed.set()

    async def _answer(self, making: Making, number: int) -> None:
        """One answer from its first token to its verdict."""
        episode = making.episodes[number]
        if episode is None:
            episode = await self._sampled(making, number)
        making.moved = time.monotonic()
        if episode is None:
            making.lost.add(number)
        else:
            verdict = await self._verdict(making, number, episode)
            making.verdicts[number], making.moved = verdict, time.monotonic()
        if making.complete:
            self._end(making)

    async def _sampled(self, making: Making, number: int) -> Episode | None:
        begun = making.begun.pop(number, None)
        answer = self.answers.begin(making.prompt, number, self.recipe.sampling, begun)
        making.answers[number] = answer
        asyncio.get_running_loop().call_soon(self._look)
        result = await answer.result()
        episode = making.episodes[number] = Episode((result,)) if isinstance(result, Rollout) else result
        del making.answers[number]
        self.tally.answer(episode)
        self._look()
        return episode

    async def _verdict(self, making: Making, number: int, episode: Episode) -> Verdict:
        """Of a whole answer; a teacher scores it meanwhile."""
        if self.teacher is None:
            return await self._graded(making.prompt, episode)
        both = await all_or_none([self._graded(making.prompt, episode), self.teacher.scored(episode)])
        verdict, making.episodes[number] = cast("tuple[Verdict, Episode]", both)
        return verdict

    async def _scored(self, group: Group) -> Group:
        """A finished group that a checkpoint had without this teacher's scores has them now."""
        if self.teacher is None or all(rollout.teacher is not None for rollout in group.rollouts):
            return group
        episodes = await all_or_none([self.teacher.scored(episode) for episode in group.episodes])
        return dataclasses.replace(group, episodes=tuple(episodes))

    async def _graded(self, prompt: Prompt, episode: Episode) -> Verdict:
        verdict = episode.verdict or await self.judge.ask(prompt, episode)
        if self.recipe.on_failure == "stop":  # at once, not when the group is complete
            self.recipe.settle(Group(prompt, (episode,)), [verdict])
        return verdict

    def _end(self, making: Making) -> None:
        """Every answer of a group is graded: it is finished, or it ends here and another takes its place."""
        recipe, index = self.recipe, making.prompt.index
        group = Group(making.prompt, tuple(making.sampled.values()))
        verdicts = [verdict for verdict in making.verdicts if verdict is not None]
        graded, failures = recipe.settle(group, verdicts)
        del self.making[index]
        self.prompts.learned(graded.prompt, graded.rewards)
        if not len(graded.rewards):
            self._drop(Ended(graded, "failed"), failures)
        elif recipe.informative is not None and not recipe.informative(graded):
            self._drop(Ended(graded, "uninformative"), failures)
        else:
            self._finish(index, graded, failures)
        self._fill()

    def _finish(self, index: int, group: Group, failures: Failures) -> None:
        oldest = _oldest(_trained(group), self.admission.version)
        newest = max((int(r.weight_versions.max(initial=0)) for r in _trained(group)), default=0)
        first, held = self.admission.open[index].oldest, self.admission.version
        if oldest < first or newest > held:
            raise AnswerError(
                f"an answer to prompt {index} has tokens of weights {oldest} to {newest}, and it was sampled while the "
                f"servers held {first} to {held}"
            )
        self.admission.finish(index, oldest)
        self.finished[index] = group
        self.tally.group("finished", failures)
        self._dropped.clear()

    def _drop(self, ended: Ended, failures: Failures) -> None:
        """A group ends untrained. Raises NothingToLearnError or RewardError where too many in a row do."""
        self.admission.drop(ended.group.prompt.index, ended.end)
        self._ended.append(ended)
        self.tally.group(ended.end, failures)
        self._dropped[ended.end] += 1
        if self.admission.dropped_in_a_row < self.recipe.most_dropped:
            return
        why = f". Besides, {self.tally.failures}" if self.tally.failures.first else ""
        if not self._dropped["uninformative"]:
            raise RewardError(f"of {self._dropped['failed']} groups in a row nothing is left to train on{why}")
        raise NothingToLearnError(
            f"{self._dropped.total()} groups in a row had no rewards that differ: the task is too easy or too hard for "
            "the model; take other data, raise rollout.max_sampling_rounds, or set objective.dynamic_sampling=false"
            + why
        )

    # Waiting

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    def _last_move(self, since: float) -> float:
        """When what the step waits for last got further, or since when it waits."""
        waited = [self.making[index].last_move for index in self.admission.waits_for()]
        return max([since, *waited])

    def _cut(self) -> None:
        """The answers that a step waits for end with what they have."""
        for index in self.admission.waits_for():
            for answer in list(self.making[index].answers.values()):
                answer.cut()

    def _look(self) -> None:
        self.tally.servers(*self.answers.servers, time.monotonic())


def _trained(group: Group) -> list[Rollout]:
    return [rollout for episode in group.episodes if episode.reward is not None for rollout in episode.rollouts]


def _oldest(rollouts: Iterable[Rollout], version: int) -> int:
    """The oldest version of any sampled token, `version` where there is none."""
    return min([version, *(int(r.weight_versions[r.trained].min(initial=version)) for r in rollouts)])
