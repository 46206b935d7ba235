"""gpt-oss, as SGLang has it, but for the dtype of its sinks: there bfloat16, here that of the other weights."""

from typing import Any

import torch
from sglang.srt.models import gpt_oss
from sglang.srt.models.gpt_oss import EntryClass

__all__ = ["EntryClass"]

_init = gpt_oss.GptOssAttention.__init__


def with_sinks(attention: Any, *args: Any, **kwargs: Any) -> None:
    """GptOssAttention.__init__: the sinks, made again."""
    _init(attention, *args, **kwargs)
    sinks = torch.empty(attention.num_heads, dtype=attention.o_proj.params_dtype)
    attention.sinks = torch.nn.Parameter(sinks, requires_grad=False)


gpt_oss.GptOssAttention.__init__ = with_sinks  # pyright: ignore[reportAttributeAccessIssue]
