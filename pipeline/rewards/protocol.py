"""What a verifier is asked, what comes of it, and how both travel between the processes of a grader.

    driver -> supervisor -> worker    question: number [8 bytes], length [4], then a pickle of that length
    worker -> supervisor -> driver    verdict:  number [8], code [1], reward [8, double], length [4], then UTF-8 text

Nothing that a worker sends is unpickled, because its verifier could have written it.
"""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Iterator
from dataclasses import dataclass
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

LONGEST_TEXT = 4000
"""Bytes of what a verdict says."""

_QUESTION, _VERDICT = struct.Struct("<QI"), struct.Struct("<QBdI")


@dataclass(frozen=True)
class Question:
    """One answer to grade; a verifier's arguments."""

    prompt: Prompt
    response_text: str
    response_ids: np.ndarray
    finish_reason: FinishReason


@dataclass(frozen=True)
class Verdict:
    """A reward, or a kind of failure and what happened ("took more than 30 s"), which goes on from "the verifier"."""

    reward: float | None = None
    kind: FailureKind | None = None
    what: str = ""


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
    grace_s: float = 0.5


class ProtocolError(RuntimeError):
    """What came from a worker is no verdict."""


def pack_question(number: int, question: Question) -> bytes:
    """As it travels: plain values, which pickle writes many times faster than our classes and arrays."""
    prompt = question.prompt
    told = (prompt.index, prompt.text, prompt.metadata, prompt.ids.astype(np.int32, copy=False).tobytes())
    answered = (question.response_text, question.response_ids.astype(np.int32, copy=False).tobytes())
    body = pickle.dumps((told, answered, question.finish_reason), pickle.HIGHEST_PROTOCOL)
    return _QUESTION.pack(number, len(body)) + body


def questions_in(buffer: bytearray) -> Iterator[tuple[int, bytes]]:
    """Number and bytes, header included, of each whole question; what is taken leaves the buffer."""
    start = 0
    while len(buffer) - start >= _QUESTION.size:
        number, length = _QUESTION.unpack_from(buffer, start)
        end = start + _QUESTION.size + length
        if len(buffer) < end:
            break
        yield number, bytes(buffer[start:end])
        start = end
    del buffer[:start]


def unpack_question(packed: bytes) -> Question:
    """Of the bytes that `pack_question` made."""
    (index, text, metadata, ids), (response, response_ids), finish_reason = pickle.loads(packed[_QUESTION.size :])
    prompt = Prompt(np.frombuffer(ids, np.int32).copy(), text, metadata, index)
    return Question(prompt, response, np.frombuffer(response_ids, np.int32).copy(), finish_reason)


def pack(number: int, code: int, reward: float = 0.0, text: str = "") -> bytes:
    """A verdict, or what a worker says of itself, as it travels."""
    body = text.encode("utf-8", "backslashreplace")[:LONGEST_TEXT]
    return _VERDICT.pack(number, code, reward, len(body)) + body


def pack_verdict(number: int, verdict: Verdict) -> bytes:
    """As it travels."""
    if verdict.kind is None:
        assert verdict.reward is not None
        return pack(number, 0, verdict.reward)
    return pack(number, 1 + KINDS.index(verdict.kind), text=verdict.what)


def packed_in(buffer: bytearray) -> Iterator[tuple[int, int, float, str]]:
    """Number, code, reward and text of each whole message; what is taken leaves the buffer.

    Raises ProtocolError for what `pack` cannot have made.
    """
    start = 0
    while len(buffer) - start >= _VERDICT.size:
        number, code, reward, length = _VERDICT.unpack_from(buffer, start)
        if length > LONGEST_TEXT or not (code <= len(KINDS) or code in (REFUSED, READY)) or not math.isfinite(reward):
            raise ProtocolError("these bytes are no verdict")
        end = start + _VERDICT.size + length
        if len(buffer) < end:
            break
        text = bytes(buffer[start + _VERDICT.size : end]).decode("utf-8", "replace")
        start = end
        yield number, code, reward, text
    del buffer[:start]


def as_verdict(code: int, reward: float, text: str) -> Verdict:
    """Of a message with one of the codes of verdicts."""
    return Verdict(reward=reward) if code == 0 else Verdict(kind=KINDS[code - 1], what=text)
