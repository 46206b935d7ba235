"""What a verifier is asked, what comes of it, and how both travel between the processes of a grader.

    driver -> supervisor -> worker    question: number [8 bytes], component [2], length [4], a pickle of that length
    worker -> supervisor -> driver    verdict:  number [8], code [1], reward and seconds [8 each, doubles], length [4],
                                                UTF-8 text

Nothing that a worker sends is unpickled, because its verifier could have written it.
"""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from pipeline.types import FinishReason, Prompt

FailureKind = Literal[
    "timeout",
    "raised",
    "exited",
    "crashed",
    "not_a_number",
    "output",
    "memory",
    "processes",
    "left_behind",
    "not_loaded",
]
"""Why there is no reward: took too long; raised; ended its process; died of a signal; returned no finite float32; wrote
too much; took too much memory; started too many processes; returned and left a process or thread; could not be loaded
again after its process had died."""

KINDS: tuple[FailureKind, ...] = get_args(FailureKind)
REFUSED, READY = 254, 255
"""Codes of a worker that has loaded its verifier, or could not. 0 is a reward, 1 + i is KINDS[i]."""

LARGEST = float(np.finfo(np.float32).max)
"""Of rewards."""

LONGEST_TEXT = 4000
"""Bytes of what a verdict says."""

_QUESTION, _VERDICT = struct.Struct("<QHI"), struct.Struct("<QBddI")


@dataclass(frozen=True)
class Question:
    """One answer to grade; a verifier's arguments.

    trained_tokens: that the policy sampled, of the whole episode; None: all of response_ids.
    """

    prompt: Prompt
    response_text: str
    response_ids: np.ndarray
    finish_reason: FinishReason
    trained_tokens: int | None = None

    @property
    def length(self) -> int:
        """Tokens that the policy sampled."""
        return len(self.response_ids) if self.trained_tokens is None else self.trained_tokens


@dataclass(frozen=True)
class Verdict:
    """A reward, or a kind of failure and what happened ("took more than 30 s"), which goes on from "the verifier".

    seconds: that grading took, from when a worker had the answer. verifier: which one spoke, or failed; empty where
    that is known. Where this is of all components together, parts: of each by its name; response: the text of the
    answer, as they read it.
    """

    reward: float | None = None
    kind: FailureKind | None = None
    what: str = ""
    seconds: float = 0.0
    verifier: str = ""
    parts: Mapping[str, Verdict] = field(default_factory=dict)
    response: str = ""


@dataclass(frozen=True)
class Limits:
    """Of a verifier on one answer.

    timeout_s: seconds. memory_gb: resident memory, 1e9 bytes, of its worker and what that started. start_s: to import
    the verifier. output_bytes: written to stdout and stderr. processes: that it may have started at a time.
    grace_s: how long what it started may take to end after it has returned.
    """

    timeout_s: float = 30.0
    memory_gb: float = 4.0
    start_s: float = 120.0
    output_bytes: int = 1 << 20
    processes: int = 256
    grace_s: float = 2.0


class ProtocolError(RuntimeError):
    """What came from a worker is no verdict."""


def pack_question(question: Question) -> bytes:
    """As it travels: plain values, which pickle writes many times faster than our classes and arrays."""
    prompt = question.prompt
    told = (prompt.index, prompt.text, prompt.metadata, prompt.ids.astype(np.int32, copy=False).tobytes())
    answered = (question.response_text, question.response_ids.astype(np.int32, copy=False).tobytes())
    how = (question.finish_reason, question.trained_tokens)
    return pickle.dumps((told, answered, how), pickle.HIGHEST_PROTOCOL)


def address(number: int, component: int, packed: bytes) -> bytes:
    """A packed question with its header, for one component."""
    return _QUESTION.pack(number, component, len(packed)) + packed


def component_of(addressed: bytes) -> int:
    """Which component a question goes to."""
    return _QUESTION.unpack_from(addressed)[1]


def questions_in(buffer: bytearray) -> Iterator[tuple[int, bytes]]:
    """Number and bytes, header included, of each whole question; what is taken leaves the buffer."""
    start = 0
    while len(buffer) - start >= _QUESTION.size:
        number, _, length = _QUESTION.unpack_from(buffer, start)
        end = start + _QUESTION.size + length
        if len(buffer) < end:
            break
        yield number, bytes(buffer[start:end])
        start = end
    del buffer[:start]


def unpack_question(packed: bytes) -> Question:
    """Of the bytes that `address` made."""
    (index, text, metadata, ids), (response, response_ids), (finish_reason, trained) = pickle.loads(
        packed[_QUESTION.size :]
    )
    prompt = Prompt(np.frombuffer(ids, np.int32).copy(), text, metadata, index)
    return Question(prompt, response, np.frombuffer(response_ids, np.int32).copy(), finish_reason, trained)


def pack(number: int, code: int, reward: float = 0.0, text: str = "", seconds: float = 0.0) -> bytes:
    """A verdict, or what a worker says of itself, as it travels."""
    body = text.encode("utf-8", "backslashreplace")[:LONGEST_TEXT]
    return _VERDICT.pack(number, code, reward, seconds, len(body)) + body


def pack_verdict(number: int, verdict: Verdict) -> bytes:
    """As it travels."""
    if verdict.kind is None:
        assert verdict.reward is not None
        return pack(number, 0, verdict.reward, seconds=verdict.seconds)
    return pack(number, 1 + KINDS.index(verdict.kind), text=verdict.what, seconds=verdict.seconds)


@dataclass(frozen=True)
class Message:
    """What a worker or the supervisor says, unpacked. number: of the question; code, reward, text: see the top."""

    number: int
    code: int
    reward: float
    text: str
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """Of a message with one of the codes of verdicts."""
        if self.code == 0:
            return Verdict(reward=self.reward, seconds=self.seconds)
        return Verdict(kind=KINDS[self.code - 1], what=self.text, seconds=self.seconds)


def messages_in(buffer: bytearray) -> Iterator[Message]:
    """Each whole message; what is taken leaves the buffer. Raises ProtocolError for what `pack` cannot have made."""
    start = 0
    while len(buffer) - start >= _VERDICT.size:
        number, code, reward, seconds, length = _VERDICT.unpack_from(buffer, start)
        if length > LONGEST_TEXT or not (code <= len(KINDS) or code in (REFUSED, READY)) or not math.isfinite(reward):
            raise ProtocolError("these bytes are no verdict")
        end = start + _VERDICT.size + length
        if len(buffer) < end:
            break
        text = bytes(buffer[start + _VERDICT.size : end]).decode("utf-8", "replace")
        start = end
        yield Message(number, code, reward, text, seconds)
    del buffer[:start]
