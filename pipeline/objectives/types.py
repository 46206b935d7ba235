"""What an objective takes and gives back.

Three policies stand behind every sampled token: `rollout` (mu, the engine that sampled it), `proximal` (pi_o, the
trainer at the start of this update) and `current` (pi, the trainer now). Everything here is a padded matrix over the
response tokens of whole sequences. `mask` says which of them are trained: a row may have False anywhere, behind the
response and between its tokens, as a conversation has where others speak. What stands there is never read, and the loss
is that of the same rows with these entries taken out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Denominators:
    """What the losses of one mini-batch are divided by, over all its micro-batches and all data-parallel ranks.

    With these fixed, the losses of any partition of the mini-batch add up to the loss of the whole.

    sequences:  sequences of the mini-batch, those with no trained token included.
    tokens:     trained tokens of the mini-batch.
    max_length: response tokens; the constant of `token_sum_constant` (the longest response that may be sampled).
    prompts:    prompts of the mini-batch, for `prompt_token_mean`; None where it is not known.
    """

    sequences: int
    tokens: int
    max_length: int
    prompts: int | None = None

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.max_length < 1 or self.tokens < 0:
            raise ValueError(f"a mini-batch has sequences >= 1, max_length >= 1 and tokens >= 0, got {self}")
        if self.prompts is not None and not 1 <= self.prompts <= self.sequences:
            raise ValueError(f"a mini-batch has a prompt at least and not more prompts than sequences, got {self}")

    @classmethod
    def of(cls, mask: Tensor, max_length: int, prompts: int | None = None) -> Denominators:
        """The denominators of the mini-batch whose whole mask [sequences, tokens] bool is here."""
        return cls(mask.shape[0], int(mask.sum()), max_length, prompts)


@dataclass(frozen=True)
class LossInputs:
    """A subset of a mini-batch: S whole sequences of at most T response tokens.

    All floating tensors but the advantages have one dtype, float32 or float64; the advantages are either of the two.
    All have one device. Raises ValueError, with the field's name, for another shape or dtype.

    current_logprobs:   [S, T], log pi; the loss is differentiable in it.
    proximal_logprobs:  [S, T], log pi_o.
    rollout_logprobs:   [S, T], log mu at the sampling temperature. Read only where a correction asks for it.
    advantages:         [S] or [S, T]; constant.
    mask:               [S, T] bool, True on trained tokens.
    reference_logprobs: [S, T], log pi_ref; for a KL term in the loss.
    teacher_logprobs:   [S, T], log pi_T; for a teacher's term in the loss.
    current_top_logprobs, teacher_top_logprobs: [S, T, k], of the k tokens that the teacher thinks likeliest there, in
                        one order; the loss is differentiable in the first.
    entropy:            [S, T], entropy of pi at each position; for an entropy bonus; differentiable.
    values:             [S, T], the critic now; differentiable.
    proximal_values:    [S, T], the critic at the start of this update.
    returns:            [S, T], what the critic regresses on (advantages + proximal_values).
    prompt_tokens:      [S], trained tokens of the sequence's prompt, all its samples of the mini-batch together; for
                        `prompt_token_mean`. Any dtype that holds integers exactly.
    sample_ids:         the caller's number of each sequence, which errors name; without them they name the row.
    """

    current_logprobs: Tensor
    proximal_logprobs: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    reference_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    current_top_logprobs: Tensor | None = None
    teacher_top_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None
    proximal_values: Tensor | None = None
    returns: Tensor | None = None
    prompt_tokens: Tensor | None = None
    sample_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_dtype("current_logprobs", self.current_logprobs)
        check_dtype("advantages", self.advantages)
        if self.mask.dtype != torch.bool or self.mask.dim() != 2:
            raise ValueError(f"mask is [sequences, tokens] bool, got {list(self.mask.shape)} {self.mask.dtype}")
        if self.advantages.shape not in (self.mask.shape[:1], self.mask.shape):
            raise ValueError(
                f"advantages are [sequences] or [sequences, tokens], got {list(self.advantages.shape)} "
                f"for a mask {list(self.mask.shape)}"
            )
        for name in (
            "current_logprobs",
            "proximal_logprobs",
            "rollout_logprobs",
            "reference_logprobs",
            "teacher_logprobs",
            "current_top_logprobs",
            "teacher_top_logprobs",
            "entropy",
            "values",
            "proximal_values",
            "returns",
        ):
            tensor = getattr(self, name)
            if tensor is not None and (tensor[..., 0] if "top" in name else tensor).shape != self.mask.shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, the mask is {list(self.mask.shape)}")
            if tensor is not None and tensor.dtype != self.current_logprobs.dtype:
                raise ValueError(f"{name} is {tensor.dtype}, current_logprobs is {self.current_logprobs.dtype}")
        for name in ("prompt_tokens", "sample_ids"):
            numbers = getattr(self, name)
            if numbers is not None and len(numbers) != len(self.mask):
                raise ValueError(f"{name} has {len(numbers)} numbers for {len(self.mask)} sequences")


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless a tensor is float32 or float64: a ratio of bfloat16 log-probs is off by percents."""
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} is {tensor.dtype}; an objective takes float32 or float64")


@dataclass(frozen=True)
class Metric:
    """One number that reduces exactly over micro-batches and ranks.

    total: scalar tensor.
    count: scalar tensor; what `total` is divided by at the end, for "mean".
    kind:  "mean" (add totals, add counts, divide), "sum" (add totals), "max" (largest total).
    """

    total: Tensor
    count: Tensor
    kind: Literal["mean", "sum", "max"] = "mean"

    def value(self) -> float:
        """The number. A mean over nothing is 0/0 and comes back as nan, which is what it is."""
        return float(self.total / self.count) if self.kind == "mean" else float(self.total)


@dataclass(frozen=True)
class LossOutputs:
    """loss: scalar, this call's share of the mini-batch's loss (to be minimised). metrics: by name, detached."""

    loss: Tensor
    metrics: dict[str, Metric] = field(default_factory=dict)
