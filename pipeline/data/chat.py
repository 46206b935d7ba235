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


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str:
    """Messages with the opening of the assistant's turn behind them.

    Raises DataError: no chat template, or a template that refuses the messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; add chat_template.jinja to the model directory")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise DataError(f"the chat template refused the messages: {error}") from error
    assert isinstance(text, str)
    return text


def user_prompt(tokenizer: PreTrainedTokenizerBase, content: str, metadata: dict[str, Any], index: int) -> Prompt:
    """One user message, through the chat template. Raises DataError as chat_text and token_ids do."""
    text = chat_text(tokenizer, [{"role": "user", "content": content}])
    (ids,) = token_ids(tokenizer, [text])
    check_known(tokenizer, ids, text)
    return Prompt(ids, text, metadata, index)


def answer_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """[N] int32: the answer as the model must write it, end-of-sequence token last. Raises DataError."""
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise DataError("the tokenizer has no end-of-sequence token, so an answer could never stop")
    (ids,) = token_ids(tokenizer, [text])
    check_known(tokenizer, ids, text)
    return np.append(ids, np.int32(eos))


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """[N] int32 for each text; a few hundred at once take half the time of one by one."""
    # A template has written the special tokens already.
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [np.asarray(ids, np.int32) for ids in encoded]


def check_known(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, text: str) -> None:
    """Raise DataError where a text [N] holds a character that has no token."""
    unknown = tokenizer.unk_token_id
    if unknown is not None and (ids == unknown).any():
        raise DataError(
            f"the tokenizer has no token for some character of {text[:200]!r}; a tiny model reads any text with "
            "model.tiny.tokenizer=bytes"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, vocab_size: int, name: str) -> None:
    """Raise DataError where there is no token, or one that the model has no embedding of. name: whose ids [N] they are.

    vocab_size: of the model. A tokenizer has more where tokens were added and the embedding was not resized.
    """
    if not len(ids):
        raise DataError(f"{name} is no token at all; a model cannot go on from nothing")
    if (largest := int(ids.max())) >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise DataError(
            f"{name}: the token {token!r} has the id {largest}, and the model's vocab_size is {vocab_size}, so it has "
            "no embedding; take the model's own tokenizer, or leave that token out"
        )
