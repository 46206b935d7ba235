"""What a set of graded answers says of a policy: pass@k, majority@k, and how sure that is.

pass@k      1 - C(n - c, k) / C(n, k), of n answers of which c pass: the chance that k of them, drawn without putting
            back, hold one that passes (2107.03374, equation 1). Unbiased for every k <= n.
majority@k  the chance that the answer given most often among k of the n passes; ties are broken evenly.
intervals   95%, by the percentile bootstrap over questions: these are the sample, not their answers.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

_SUBSETS = 4096
"""Subsets of a question's answers that are looked at, at most; all of them where there are no more."""
_RESAMPLES = 1000
_NUMBERS = 10_000_000  # held at a time by the bootstrap


def pass_at_k(answers: int, passed: int, k: int) -> float:
    """Of one question; nan where it has fewer than k answers."""
    if answers < k:
        return math.nan
    return 1 - math.comb(answers - passed, k) / math.comb(answers, k)


def majority_at_k(given: Sequence[str | None], passed: Sequence[bool], k: int) -> float:
    """Of one question; nan where it has fewer than k answers.

    given: what each answer says; None: nothing that could be counted, which is no vote. passed: of each.
    """
    if len(given) < k:
        return math.nan
    right = _share_that_passes(given, passed)
    if math.comb(len(given), k) <= _SUBSETS:
        subsets = itertools.combinations(range(len(given)), k)
    else:
        rng = np.random.default_rng(0)
        subsets = (rng.choice(len(given), k, replace=False) for _ in range(_SUBSETS))
    return float(np.mean([_plurality([given[i] for i in subset], right) for subset in subsets]))


def _share_that_passes(given: Sequence[str | None], passed: Sequence[bool]) -> dict[str, float]:
    """One number a distinct answer: equal answers have one verdict, unless their verifier is of two minds."""
    votes: dict[str, list[bool]] = {}
    for text, passes in zip(given, passed, strict=True):
        if text is not None:
            votes.setdefault(text, []).append(passes)
    return {text: float(np.mean(verdicts)) for text, verdicts in votes.items()}


def _plurality(given: Sequence[str | None], right: dict[str, float]) -> float:
    counts = Counter(text for text in given if text is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    return float(np.mean([right[text] for text, count in counts.items() if count == most]))


def interval(values: np.ndarray) -> tuple[float, float]:
    """Ends of the 95% interval of the mean of values [questions]; the mean itself, twice, of a single one."""
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    from scipy.stats import bootstrap

    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=_RESAMPLES,
        batch=max(1, _NUMBERS // len(values)),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
