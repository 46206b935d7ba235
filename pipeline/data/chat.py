"""Text to token ids through a tokenizer's chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.config.sources import ChatConfig
from pipeline.errors import NOT_STARTED, SamerouteError
from pipeline.types import Opening, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STRANGE = "\U0001f9ff\ua66e\u2603\ue000\u0a85"
"""Characters that no small alphabet has: a tokenizer that reads these reads any text."""
_SLACK = 64  # bytes that a template may add for one row and not for another


class DataError(SamerouteError, ValueError):
    """Prompts cannot be read or used; the message says where and what to change."""

    exit_code = NOT_STARTED


class TooLongError(DataError):
    """A prompt has more tokens than data.max_prompt_tokens."""


class Asked(NamedTuple):
    """One question, before a chat template.

    messages: role and content of each. answer: what is right, where that is known. metadata: for the verifier, the
    answer included. where: for messages, "data.jsonl, line 7". origin: "source:row", by which pass rates are kept.
    """

    messages: list[dict[str, Any]]
    answer: str | None
    metadata: dict[str, Any]
    tools: list[dict[str, Any]] | None
    where: str
    origin: str

    @property
    def text(self) -> str:
        """What the messages say, one below the other; duplicates and held-out prompts are told by it."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n".join(message["content"] for message in self.messages)


class PromptWriter:
    """Questions to prompts of one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, limit: int, chat: ChatConfig):
        """vocab_size: of the model. limit: longest prompt, tokens. Raises DataError for a chat template that does not
        have what `chat` gives it."""
        self.tokenizer, self.vocab_size, self.limit, self.chat = tokenizer, vocab_size, limit, chat
        self.variables = chat.template_variables
        check_template(tokenizer, [*self.variables, *(["tools"] if chat.tools else [])])
        self._around: dict[tuple[str, ...], int] = {}

    def text(self, asked: Asked) -> str:
        """Raises DataError, which does not say where."""
        opening = self.opening(asked)
        return chat_text(self.tokenizer, opening.messages, opening.tools, opening.variables)

    def opening(self, asked: Asked) -> Opening:
        """What the chat template is given."""
        messages = asked.messages
        if self.chat.system_prompt is not None:
            own = messages[0]["role"] == "system"
            messages = [{"role": "system", "content": self.chat.system_prompt}, *messages[own:]]
        return Opening(tuple(messages), (*self.chat.tools, *(asked.tools or ())), self.variables)

    def prompts(self, asked: Sequence[Asked], indices: Sequence[int]) -> list[Prompt | DataError]:
        """A prompt for each question, or why there is none."""
        texts = [_result(lambda one=one: self.text(one)) for one in asked]
        good = [text for text in texts if isinstance(text, str)]
        ids = iter(token_ids(self.tokenizer, good) if good else [])
        out: list[Prompt | DataError] = []
        for one, text, index in zip(asked, texts, indices, strict=True):
            result = text if isinstance(text, DataError) else _result(lambda t=text: self._checked(next(ids), t))
            if isinstance(result, DataError):
                out.append(type(result)(f"{one.where}: {result}"))
            else:
                out.append(Prompt(result, str(text), one.metadata, index, one.origin, self.opening(one)))
        return out

    def answer(self, asked: Asked) -> np.ndarray:
        """[N] int32, as `answer_ids`. Raises DataError, naming the row."""
        try:
            if asked.answer is None:
                raise DataError("there is none, and supervised steps imitate one")
            ids = answer_ids(self.tokenizer, asked.answer)
            check_vocabulary(self.tokenizer, ids, self.vocab_size)
        except DataError as error:
            raise DataError(f"{asked.where}: the answer: {error}") from error
        return ids

    @property
    def reads_any_text(self) -> bool:
        """Whether every text has tokens that the model has an embedding of."""
        if len(self.tokenizer) > self.vocab_size:
            return False
        unknown = self.tokenizer.unk_token_id
        return unknown is None or not any((ids == unknown).any() for ids in token_ids(self.tokenizer, [_STRANGE]))

    def at_most(self, asked: Asked) -> int:
        """More tokens than this the prompt does not have: a token takes a byte at least, and what the template adds is
        taken from the first question of the same roles. Raises DataError for what the template refuses there."""
        size = sum(_bytes(message["content"]) for message in asked.messages)
        if asked.tools:
            return _bytes(self.text(asked))
        roles = tuple(message["role"] for message in asked.messages)
        if roles not in self._around:
            self._around[roles] = max(0, _bytes(self.text(asked)) - size) + _SLACK
        return size + self._around[roles]

    def _checked(self, ids: np.ndarray, text: str) -> np.ndarray:
        check_known(self.tokenizer, ids, text)
        check_vocabulary(self.tokenizer, ids, self.vocab_size)
        if len(ids) > self.limit:
            raise TooLongError(
                f"the prompt has {len(ids)} tokens, the limit is {self.limit}; raise data.max_prompt_tokens, or leave "
                "such prompts out with data.filters.too_long=drop"
            )
        return ids


def check_template(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> None:
    """Raise DataError where the chat template never reads a variable: it would be ignored without a word."""
    template = tokenizer.chat_template or ""
    text = template if isinstance(template, str) else "\n".join(map(str, template.values()))
    if unread := [name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)]:
        raise DataError(
            f"the chat template reads no variable {unread[0]!r}; leave it out of `chat`, or correct its name"
        )


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
    *,
    to_answer: bool = True,
) -> str:
    """Messages, and with `to_answer` the opening of the assistant's turn behind them.

    Raises DataError: no chat template, or a template that refuses the messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; add chat_template.jinja to the model directory")
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=to_answer,
            **(variables or {}),
        )
    except TemplateError as error:
        raise DataError(f"the chat template refused the messages: {error}") from error
    assert isinstance(text, str)
    return text


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


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, vocab_size: int) -> None:
    """Raise DataError where there is no token in ids [N], or one that the model has no embedding of.

    vocab_size: of the model. A tokenizer has more where tokens were added and the embedding was not resized.
    """
    if not len(ids):
        raise DataError("it is no token at all; a model cannot go on from nothing")
    if (largest := int(ids.max())) >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise DataError(
            f"the token {token!r} has the id {largest}, and the model's vocab_size is {vocab_size}, so it has "
            "no embedding; take the model's own tokenizer, or leave that token out"
        )


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _result(act: Any) -> Any:
    try:
        return act()
    except DataError as error:
        return error
