"""What a teacher says of the tokens after a prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TeacherScores:
    """Of one rollout of N tokens after its prompt; what stands at tokens that were not sampled is not read.

    logprobs:     [N] float32, log pi_T of each token at the sampling temperature.
    top_ids:      [N, k] int32, the tokens that the teacher thinks likeliest there, each once. None: not asked for.
    top_logprobs: [N, k] float32, of these, largest first.
    Raises ValueError where these do not go together.
    """

    logprobs: np.ndarray
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None

    def __post_init__(self):
        for name, dtype, dimensions in (
            ("logprobs", "float32", 1),
            ("top_ids", "int32", 2),
            ("top_logprobs", "float32", 2),
        ):
            array = getattr(self, name)
            if array is not None and (array.dtype.name != dtype or array.ndim != dimensions):
                raise ValueError(f"a teacher's {name} is {array.dtype} {list(array.shape)}, not {dtype}")
        if (self.top_ids is None) != (self.top_logprobs is None):
            raise ValueError("a teacher's top tokens come with their log-probs")
        shapes = {array.shape for array in (self.top_ids, self.top_logprobs) if array is not None}
        if len(shapes) > 1 or any(len(self) != shape[0] for shape in shapes):
            raise ValueError(f"a teacher's top tokens are {' and '.join(map(str, shapes))} for {len(self)} tokens")
        if not all(np.isfinite(array).all() for array in (self.logprobs, self.top_logprobs) if array is not None):
            raise ValueError("a teacher's log-probs hold one that is not finite")

    @classmethod
    def unread(cls, tokens: int, top_k: int) -> TeacherScores:
        """Of tokens of which none was sampled, so that nobody reads it."""
        zeros = np.zeros(tokens, np.float32)
        if not top_k:
            return cls(zeros)
        return cls(zeros, np.zeros((tokens, top_k), np.int32), np.zeros((tokens, top_k), np.float32))

    def __len__(self) -> int:
        return len(self.logprobs)

    @property
    def top_k(self) -> int:
        return 0 if self.top_ids is None else self.top_ids.shape[1]
