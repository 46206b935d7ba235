"""A piece of the stream of weights: whole tensors under Hugging Face names, of bounded size together."""

from __future__ import annotations

from torch import Tensor

Bucket = list[tuple[str, Tensor]]
