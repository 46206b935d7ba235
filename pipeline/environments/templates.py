"""What a chat template writes behind an answer, and whether it leaves alone what stands before.

    before    the conversation, with the opening of the assistant's turn
    spoken    what the policy sampled then, without its stop token
    whole     the conversation with that answer and the messages that follow it, with the next opening

A conversation may grow by the new suffix alone where `whole` begins with what stands there already. Many templates
are not like that: they drop the thinking of earlier answers, end the last answer with another token than an earlier
one, or put tools before the last question. Both renderings say so, and nothing else has to be known of a template.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.data.chat import DataError, chat_text, token_ids
from pipeline.errors import NOT_STARTED, SamerouteError
from pipeline.types import Opening

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Role = Literal["user", "tool"]

_SHOWN = 60  # characters of each rendering in a message


class HistoryError(SamerouteError):
    """A conversation cannot grow by its new messages alone; the message says where the template changes what stands
    there."""

    exit_code = NOT_STARTED


class TemplateWriter:
    """The chat template of one conversation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, opening: Opening, stop_token_ids: Sequence[int]):
        """opening: its tools and variables count. stop_token_ids: what may end an answer."""
        self.tokenizer, self.opening = tokenizer, opening
        self.stops = tuple(self.text([i]) for i in stop_token_ids)

    def with_tools(self, tools: Sequence[dict[str, Any]]) -> TemplateWriter:
        """One of the same conversation, with other tools."""
        other = copy.copy(self)
        other.opening = replace(self.opening, tools=tuple(tools))
        return other

    def text(self, ids: Sequence[int] | np.ndarray) -> str:
        """Of token ids [N], special tokens included."""
        text = self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)
        assert isinstance(text, str)
        return text

    def ids(self, text: str) -> np.ndarray:
        """[N] int32."""
        return token_ids(self.tokenizer, [text])[0]

    def render(self, messages: Sequence[Message], *, to_answer: bool = True) -> str:
        """Raises HistoryError for messages that the template refuses."""
        try:
            text = chat_text(self.tokenizer, messages, self.opening.tools, self.opening.variables, to_answer=to_answer)
            text.encode()
        except UnicodeEncodeError as error:  # of a name of a file, or of JSON that was cut
            raise HistoryError(
                f"the messages hold half of a character, {text[error.start]!r}, of which no token can be made; "
                f"messages of the roles {_roles(messages)}"
            ) from error
        except (DataError, TypeError, KeyError) as error:  # a template that adds a text to a mapping
            raise HistoryError(f"{error}; messages of the roles {_roles(messages)}") from error
        return text

    def suffix(
        self, before: str, spoken: str, stop: str | None, history: Sequence[Message], new: Sequence[Message]
    ) -> tuple[str, str]:
        """What the template writes behind an answer, the next opening included; and the whole conversation.

        history: all messages up to the answer. new: those that follow it. stop: text of the stop token that ended the
        answer and stands there already; None: it was cut, and the template's own end of an answer is part of the
        suffix. Raises HistoryError where the template changes what stands before.
        """
        whole = self.render([*history, *new])
        if whole.startswith(before + spoken):
            rest = whole[len(before + spoken) :]
        else:  # the template writes the answer in its own way: stripped, or a tool call from its parts
            alone = self.render(history, to_answer=False)
            for shorter, longer in ((before, alone), (alone, whole)):
                if not longer.startswith(shorter):
                    raise HistoryError(_difference(shorter, longer, new[0]["role"]))
            rest = self._end(alone[len(before) :]) + whole[len(alone) :]
        return (rest if stop is None else rest.removeprefix(stop)), whole

    def _end(self, answer: str) -> str:
        """What a rendered answer ends with, from its last stop token on; "" where it has none."""
        place = max((answer.rfind(stop) for stop in self.stops), default=-1)
        return answer[place:] if place >= 0 else ""


def check_growth(writer: TemplateWriter, replies: Sequence[Role]) -> None:
    """Try whether conversations can grow by messages of these roles: each answer that the template knows (plain, with
    thinking, with a tool call) is rendered before and behind such a message.

    Raises HistoryError, which says what the template changes.
    """
    template = str(writer.tokenizer.chat_template or "")
    opening = list(writer.opening.messages) or [{"role": "user", "content": "question"}]
    before = writer.render(opening)
    for role in replies:
        for answer, spoken in _answers(writer, template, role):
            new: Message = {"role": role, "content": "more"}
            if role == "tool":
                new |= {"tool_call_id": "functions.look:0", "name": _tool_name(writer.opening)}
            writer.suffix(before, spoken, None, [*opening, answer], [new])


def _answers(writer: TemplateWriter, template: str, role: Role) -> Iterator[tuple[Message, str]]:
    """Answers to try, and what the policy would have said."""

    def reads(name: str) -> bool:
        return re.search(rf"\b{name}\b", template) is not None

    calls = _call(writer) if role == "tool" and reads("tool_calls") else {}
    answer: Message = {"role": "assistant", "content": "" if calls else "answer"} | calls
    thoughts: list[tuple[Message, str]] = []
    if "</think>" in template:
        said = f"<think>\nhm\n</think>\n\n{answer['content']}"
        thoughts.append((answer | {"content": said}, said))
    thoughts += [(answer | {name: "hm"}, "hm") for name in ("reasoning_content", "thinking") if reads(name)]
    if writer.opening.variables.get("enable_thinking") is False:
        thoughts = []
    if not (calls and thoughts):  # a policy that thinks does so before it calls
        yield answer, "call" if calls else "answer"
    yield from thoughts


def _call(writer: TemplateWriter) -> Message:
    """A tool call as the template takes it: some read the arguments as a mapping, some as JSON."""
    opening = list(writer.opening.messages) or [{"role": "user", "content": "question"}]
    forms: tuple[Any, ...] = ({"x": 1}, '{"x": 1}')
    for arguments in forms:
        function = {"name": _tool_name(writer.opening), "arguments": arguments}
        calls: Message = {"tool_calls": [{"id": "functions.look:0", "type": "function", "function": function}]}
        try:
            writer.render([*opening, {"role": "assistant", "content": ""} | calls])
        except HistoryError:
            if arguments is forms[-1]:
                raise
        else:
            break
    return calls


def _tool_name(opening: Opening) -> str:
    return next((t.get("function", t).get("name", "look") for t in opening.tools), "look")


def _difference(shorter: str, longer: str, role: str) -> str:
    """Where two renderings part, in words."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(shorter, longer, strict=False))
    place = sum(1 for _ in same)
    there, then = (text[max(0, place - _SHOWN // 2) : place + _SHOWN // 2] for text in (shorter, longer))
    return (
        f"the chat template changes what stands in a conversation when a message of the role {role} follows: {there!r} "
        f"becomes {then!r}; set environment.history=split, which makes several rollouts of such a conversation, or "
        "take a template that only adds"
    )


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(str(message.get("role")) for message in messages)
