"""Text to token ids through a tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import NOT_STARTED, SamerouteError
from pipeline.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DataError(SamerouteError, ValueError):
    """Prompts cannot be read or used; the message says where and what to change."""

    exit_code = NOT_STARTED


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    metadata: dict[str, Any],
    index: int,
) -> Prompt:
    """Messages with the opening of the assistant's turn behind them.

    Raises DataError: no chat template, a template that refuses the messages, or characters that have no token.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; add chat_template.jinja to the model directory")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise DataError(f"the chat template refused the messages: {error}") from error
    assert isinstance(text, str)
    return Prompt(_encode(tokenizer, text), text, metadata, index)


def user_prompt(tokenizer: PreTrainedTokenizerBase, content: str, metadata: dict[str, Any], index: int) -> Prompt:
    """`chat_prompt` of one user message."""
    return chat_prompt(tokenizer, [{"role": "user", "content": content}], metadata, index)


def answer_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """[N] int32: the answer as the model must write it, end-of-sequence token last. Raises DataError."""
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise DataError("the tokenizer has no end-of-sequence token, so an answer could never stop")
    return np.append(_encode(tokenizer, text), np.int32(eos))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    # The template has written the special tokens already.
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int32)
    if tokenizer.unk_token_id is not None and (ids == tokenizer.unk_token_id).any():
        raise DataError(f"the tokenizer has no token for some character of {text[:200]!r}")
    return ids
