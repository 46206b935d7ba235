"""Numbers that stop an update. Each error names the ratio or the field and the samples in which it was found."""

from __future__ import annotations

from collections.abc import Sequence


class BadSamples(ValueError):
    """A number of some samples cannot be trained on.

    what:      the ratio or the field, e.g. "current/proximal" or "returns".
    sequences: rows of the call's matrices.
    samples:   the same by the caller's own numbers, where it gave them (LossInputs.sample_ids); else the rows.
    """

    def __init__(self, what: str, sequences: list[int], problem: str, sample_ids: Sequence[int] | None = None) -> None:
        self.what = what
        self.sequences = sequences
        self.samples = sequences if sample_ids is None else [sample_ids[row] for row in sequences]
        kind = "sequence" if sample_ids is None else "sample"
        super().__init__(f"{what} {problem} in {kind} {', '.join(map(str, self.samples))}")

    def __reduce__(self) -> tuple[object, ...]:
        # Errors of trainer ranks are pickled on their way to the driver, and the default calls __init__ with the text.
        return _rebuild, (type(self), self.args, self.__dict__)


class NonFiniteRatio(BadSamples):
    """A log-ratio of two policies is nan or infinite, or the ratio overflows its dtype."""

    @property
    def ratio(self) -> str:
        """Which one."""
        return self.what


class RunawayRatio(NonFiniteRatio):
    """A ratio that nothing bounds is finite, and so large that its sample would be the whole gradient."""


class NonFiniteInput(BadSamples):
    """An advantage, a value, a return, an entropy or a reward is nan or infinite."""


def _rebuild(kind: type[BadSamples], args: tuple[object, ...], state: dict[str, object]) -> BadSamples:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error
