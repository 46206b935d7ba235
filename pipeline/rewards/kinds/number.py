"""1 where the response's number is the answer's, whatever both are written like.

A number is digits with an optional sign, thousands separators, decimals and exponent ("-1,234.50", "1e-3"), or a
fraction of two of them ("3/4"). A dash with a space behind it begins a line of a list, or stands between two; it
is a sign behind =, :, ( and $. Currency signs, percent signs and units are passed over. "42." is 42.
"""

from __future__ import annotations

import decimal
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from pipeline.rewards.protocol import Question
from pipeline.rewards.registry import Verifier

_ONE = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_SIGN = r"(?:[-+\u2212]|(?:(?<=[=(:$])|(?<=[=(:] ))[-+\u2212] )"  # with a space only where no other meaning is near
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>{_SIGN}?)[$\u20ac\u00a3]?(?P<top>{_ONE})(?P<exponent>[eE][-+]?\d{{1,6}})?(?![\w]*\d)"
    rf"(?:\s?/\s?(?P<bottom>{_ONE})(?!\w*/))?"
)
_CONTEXT = decimal.Context(prec=60, Emax=10**9, Emin=-(10**9), traps=[])


def load(settings: Mapping[str, Any]) -> Verifier:
    """1.0 where they are equal, within a relative tolerance, and the response ended by itself; else 0.0.

    The verifier raises KeyError for a prompt without an answer, ValueError for an answer without a number.
    """
    key, after, tolerance = settings.get("answer", "answer"), settings.get("after"), settings.get("tolerance", 0.0)

    def number(question: Question) -> float:
        right = find_number(str(question.prompt.metadata[key]), after)
        if right is None:
            raise ValueError(f"there is no number in the answer {question.prompt.metadata[key]!r}")
        if question.finish_reason != "stop":
            return 0.0
        given = find_number(question.response_text, after, must_announce=after is not None)
        return float(given is not None and equal(given, right, tolerance))

    return number


def find_number(text: str, after: str | None = None, *, must_announce: bool = False) -> tuple[str, str] | None:
    """Numerator and denominator, as Decimal reads them, of the first number behind the last `after`, else of the last
    one of the text; None where there is none. must_announce: without `after` in the text there is none."""
    if after is not None and after in text:
        found = _NUMBER.search(text[text.rindex(after) + len(after) :])
    elif must_announce:
        return None
    else:
        *_, found = [None, *_NUMBER.finditer(text)]
    if found is None:
        return None
    sign = "-" if found["sign"].strip() in ("-", "\u2212") else ""
    return f"{sign}{found['top']}{found['exponent'] or ''}".replace(",", ""), (found["bottom"] or "1").replace(",", "")


def equal(one: tuple[str, str], other: tuple[str, str], tolerance: float) -> bool:
    """Whether two numbers are equal: exactly, or within a share of the second one."""
    a, b = (_exact(value) for value in (one, other))
    if a is not None and b is not None:
        return abs(a - b) <= Fraction(tolerance) * abs(b)
    x, y = (_CONTEXT.divide(decimal.Decimal(top), decimal.Decimal(bottom)) for top, bottom in (one, other))
    if not (x.is_finite() and y.is_finite()):
        return False
    return abs(_CONTEXT.subtract(x, y)) <= _CONTEXT.multiply(decimal.Decimal(tolerance), abs(y))


def _exact(number: tuple[str, str]) -> Fraction | None:
    """As a fraction; None where its digits written out would be too many, or it has no value."""
    top, bottom = (decimal.Decimal(part) for part in number)
    if bottom == 0 or abs(top.adjusted()) > 10_000:
        return None
    return Fraction(top) / Fraction(bottom)
