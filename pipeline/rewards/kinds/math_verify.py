"""1 where the response's expression equals the answer's, as the library math-verify says.

The answer is LaTeX, with or without dollars or a box. Of the response the last box counts; where there is none, what
the library finds: between dollars, or a number in plain text. The library's own time limits work by SIGALRM, on a main
thread only, and are off: the grader kills a worker that takes too long.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from pipeline.rewards.protocol import Question
from pipeline.rewards.registry import Verifier, VerifierError

_BOX = re.compile(r"\\f?boxed\s*\{|\\fbox\s*\{")
_BETWEEN_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,;:! ]|\{,\}|~)(?=\d{3}(?!\d))")


def load(settings: Mapping[str, Any]) -> Verifier:
    """1.0 where they are equal, and the response ended by itself; else 0.0.

    The verifier raises KeyError for a prompt without an answer, ValueError for an answer that is no expression.
    Raises VerifierError where the library is not installed.
    """
    try:
        import math_verify
    except ImportError as error:
        raise VerifierError(f"math_verify needs its library: pip install math-verify ({error})") from error
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs what cannot be read, which is no news
    key, digits, boxed = settings.get("answer", "answer"), settings.get("digits", 6), settings.get("boxed", False)
    latex = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    ways = [latex, math_verify.ExprExtractionConfig(), math_verify.StringExtractionConfig()]

    def parse(text: str) -> list[Any]:
        return math_verify.parse(text, ways, parsing_timeout=0)

    # The parser and sympy build tables when they are first used: no answer shall pay for that with its time limit.
    math_verify.verify(parse(as_box(r"x^2+\frac{1}{2}")), parse(as_box("1")), timeout_seconds=None)

    def math(question: Question) -> float:
        answer = str(question.prompt.metadata[key])
        right = parse(as_box(answer)) or parse(answer)
        if not right:
            raise ValueError(f"math-verify finds no expression in the answer {answer!r}")
        content = last_box(question.response_text)
        if question.finish_reason != "stop" or (boxed and content is None):
            return 0.0
        given = parse(plain_digits(question.response_text) if content is None else _box(content))
        return float(math_verify.verify(right, given, float_rounding=digits, timeout_seconds=None))

    return math


def as_box(answer: str) -> str:
    """An answer as a box, which the library reads as LaTeX from its beginning to its end."""
    content = last_box(answer)
    if content is not None:
        return _box(content)
    words = answer.strip()
    inside = re.fullmatch(r"\$+(.*?[^\\])\$+", words, re.DOTALL) or re.fullmatch(
        r"\\[\[(](.*)\\[\])]", words, re.DOTALL
    )
    return _box(inside[1] if inside else words)


def last_box(text: str) -> str | None:
    r"""What stands in the last \boxed{} or \fbox{} whose braces close; None where there is none."""
    for found in reversed(list(_BOX.finditer(text))):
        depth = 1
        for place in range(found.end(), len(text)):
            if text[place] in "{}" and text[place - 1] != "\\":
                depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return text[found.end() : place]
    return None


def plain_digits(text: str) -> str:
    """Without the spaces and braces that LaTeX sets between thousands."""
    return _BETWEEN_THOUSANDS.sub("", text)


def _box(content: str) -> str:
    content = plain_digits(content.strip())
    return rf"\boxed{{{content[:-1] if re.search(r'[0-9a-z}]\.$', content) else content}}}"
