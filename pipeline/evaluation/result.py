"""What an evaluation came to: its scores with intervals, and its answers as rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from pipeline.evaluation.answering import Answer
from pipeline.evaluation.estimates import interval, majority_at_k, pass_at_k
from pipeline.evaluation.opened_set import OpenedSet


@dataclass(frozen=True)
class Score:
    """A mean over questions, and the ends of its 95% interval. questions: that have it."""

    value: float
    low: float
    high: float
    questions: int


@dataclass(frozen=True)
class Evaluation:
    """Of one set, after one step.

    step, version: 0 before the first; of the weights that answered. seconds: that it took.
    scores:  reward (mean of an answer), pass@k and majority@k, by name; see `EvaluationSet.scores`.
    numbers: of the answers: length_mean (tokens), truncated_fraction, failed (that a verifier failed on).
    answers: a row an answer, of plain values.
    """

    name: str
    step: int
    version: int
    seconds: float
    questions: int
    scores: dict[str, Score]
    numbers: dict[str, float]
    answers: list[dict[str, Any]]

    def metrics(self) -> dict[str, float]:
        """eval/NAME/..., the intervals as _low and _high behind a score."""
        out: dict[str, float] = {}
        for score, found in self.scores.items():
            out |= {score: found.value, f"{score}_low": found.low, f"{score}_high": found.high}
        return {f"eval/{self.name}/{key}": value for key, value in (out | self.numbers).items()}

    def row(self) -> dict[str, Any]:
        """A line of evaluations.jsonl."""
        return {
            "step": self.step,
            "set": self.name,
            "version": self.version,
            "questions": self.questions,
            "seconds": round(self.seconds, 3),
            "scores": {key: [s.value, s.low, s.high] for key, s in self.scores.items()},
            "numbers": self.numbers,
        }

    def __str__(self) -> str:
        shown = [f"{key} {s.value:.3f} [{s.low:.3f}, {s.high:.3f}]" for key, s in self.scores.items()]
        numbers = self.numbers
        shown += [f"length {numbers['length_mean']:.1f}", f"cut {numbers['truncated_fraction']:.1%}"]
        shown += [f"{numbers['failed']:.0f} not graded"] if numbers["failed"] else []
        when = f"after step {self.step}" if self.step else "at the start"
        return f"{self.name} {when}: {'  '.join(shown)}  ({self.questions:,} questions, {self.seconds:.1f} s)"


def evaluation_of(
    asked: OpenedSet, answers: Sequence[Answer], *, step: int, version: int, seconds: float
) -> Evaluation:
    """What a set's answers came to. Answers that a verifier failed on are in no score, and counted."""
    config = asked.config
    questions = [list(own) for _, own in groupby(answers, key=lambda answer: answer.prompt.index)]
    graded = [[a for a in own if a.verdict.reward is not None] for own in questions]
    passed = [[_passes(a, config.passing_reward) for a in own] for own in graded]

    def score(of_question: Callable[[int], float]) -> Score | None:
        values = np.array([of_question(i) for i in range(len(questions))])
        values = values[~np.isnan(values)]
        return Score(float(values.mean()), *interval(values), len(values)) if len(values) else None

    def reward(i: int) -> float:
        return float(np.mean([a.verdict.reward or 0.0 for a in graded[i]])) if graded[i] else math.nan

    def majority(i: int, k: int) -> float:
        votes = questions[i][0].prompt.source in asked.given
        return majority_at_k([a.given for a in graded[i]], passed[i], k) if votes else math.nan

    scores = {"reward": score(reward)}
    for k in config.ks:
        scores[f"pass@{k}"] = score(lambda i, k=k: pass_at_k(len(passed[i]), sum(passed[i]), k))
        if k > 1 and asked.given:
            scores[f"majority@{k}"] = score(lambda i, k=k: majority(i, k))
    kinds = Counter(a.verdict.kind for a in answers if a.verdict.kind is not None)
    numbers = {
        "length_mean": float(np.mean([a.rollout.trained_tokens for a in answers])),
        "truncated_fraction": float(np.mean([a.rollout.finish_reason == "length" for a in answers])),
        "failed": float(kinds.total()),
    } | {f"failures_{kind}": float(count) for kind, count in kinds.items()}
    return Evaluation(
        config.name,
        step,
        version,
        seconds,
        len(questions),
        {name: found for name, found in scores.items() if found is not None},
        numbers,
        [_row(answer, config.passing_reward) for answer in answers],
    )


def _passes(answer: Answer, least: float) -> bool:
    return answer.verdict.reward is not None and answer.verdict.reward >= least


def _row(answer: Answer, passing_reward: float) -> dict[str, Any]:
    verdict, prompt = answer.verdict, answer.prompt
    return {
        "question": prompt.index,
        "sample": answer.sample,
        "origin": prompt.origin,
        "prompt": prompt.text,
        "response": answer.text,
        "given": answer.given,
        "reward": verdict.reward,
        "passed": _passes(answer, passing_reward),
        "parts": {name: part.reward for name, part in verdict.parts.items()},
        "failure": None if verdict.kind is None else f"{verdict.kind}: {verdict.what}",
        "finish_reason": answer.rollout.finish_reason,
        "tokens": answer.rollout.trained_tokens,
        "metadata": {key: value if isinstance(value, str | int | float | bool) else str(value)
                     for key, value in prompt.metadata.items()},
    }  # fmt: skip
