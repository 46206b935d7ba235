"""What an objective tells of its tensors, so that it reduces exactly over micro-batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.objectives.terms.reduce import is_per_token
from pipeline.objectives.types import Metric


def counted_of(values: Tensor, mask: Tensor) -> Tensor:
    """What a mean of the values is over, bool: trained tokens for [S, T], sequences that have some for [S, 1]."""
    return mask if is_per_token(values, mask) else mask.any(-1, keepdim=True)


def mean_of(values: Tensor, mask: Tensor) -> Metric:
    """Mean over trained tokens of [S, T], or over the sequences that have some of [S, 1]."""
    values, counted = values.detach(), counted_of(values, mask)
    return Metric((values * counted).sum(), counted.sum().to(values.dtype))


def share_of(chosen: Tensor, counted: Tensor) -> Metric:
    """The share of `counted` that is chosen; both bool of one shape."""
    return Metric((chosen & counted).sum().double(), counted.sum().double())


def of_ratio(log_ratio: Tensor, mask: Tensor) -> dict[str, Metric]:
    """What is reported of the surrogate's ratio, [S, T] or [S, 1]; of a product, its geometric mean."""
    return {"ratio/mean": mean_of(log_ratio.exp(), mask), "ratio/max_abs_log": largest_of(log_ratio)}


def largest_of(log_ratio: Tensor) -> Metric:
    """The largest |log ratio|; 0 of nothing."""
    values = log_ratio.detach().abs()
    largest = values.amax() if values.numel() else values.new_zeros(())
    return Metric(largest, torch.ones_like(largest), "max")


def sum_of(share: Tensor) -> Metric:
    share = share.detach()
    return Metric(share, torch.ones_like(share), "sum")
