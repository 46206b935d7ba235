"""1 where the response's expression equals the answer's, as the library math-verify says.

The library's own time limits work by SIGALRM and are off: the grader kills a worker that takes too long. It is asked on
the main thread of its process.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pipeline.rewards.protocol import Question
from pipeline.rewards.registry import Verifier, VerifierError


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
    key, digits = settings.get("answer", "answer"), settings.get("digits", 6)
    latex = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    of_answer = [latex, math_verify.ExprExtractionConfig(), math_verify.StringExtractionConfig()]
    of_response = [latex] if settings.get("boxed", False) else of_answer

    def math(question: Question) -> float:
        answer = str(question.prompt.metadata[key])
        right = math_verify.parse(_delimited(answer), of_answer, parsing_timeout=0)
        if not right:
            raise ValueError(f"math-verify finds no expression in the answer {answer!r}")
        text = question.response_text
        if question.finish_reason != "stop" or (settings.get("boxed", False) and "\\boxed" not in text):
            return 0.0
        given = math_verify.parse(text, of_response, parsing_timeout=0)
        return float(bool(given) and math_verify.verify(right, given, float_rounding=digits, timeout_seconds=None))

    return math


def _delimited(answer: str) -> str:
    """LaTeX without its dollars gets them: the library looks for LaTeX between them only."""
    return f"${answer}$" if "\\" in answer and "$" not in answer and "\\boxed" not in answer else answer
