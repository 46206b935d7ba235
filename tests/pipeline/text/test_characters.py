"""What a model writes is shown, never acted on: in files, on the console, in an error, in the report."""

import io
import os
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.observe.console import Console
from pipeline.text.characters import decode, shortened, visible

ACTS = {
    "\x1b]0;title\x07\x1b[2J": r"\x1b]0;title\x07\x1b[2J",
    "a\rb\x08\x7f": r"a\x0db\x08\x7f",
    "\x9b31m": r"\x9b31m",
    "abc\u202edef\u2066": r"abc\u202edef\u2066",
    "\u200bx\ufeff\u00ad\u2028\u2029": r"\u200bx\ufeff\xad\u2028\u2029",
    "half \ud83d": r"half \ud83d",
    "tag \U000e0041": r"tag \U000e0041",
}
STAYS = (
    "two\nlines\tand a tab",
    "d\u00e9j\u00e0 vu, \u4e2d\u6587, \u0440\u0443\u0441, \u05e9\u05dc\u05d5\u05dd",
    "\u00a0\u3000",
    "\U0001f469\u200d\U0001f4bb",
    "back\\slash",
)


@pytest.mark.parametrize(("text", "shown"), ACTS.items())
def test_what_acts_is_written_as_an_escape(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize("text", STAYS)
def test_what_is_read_stays(text):
    assert visible(text) == text


@given(st.text())
def test_the_result_acts_on_nothing_and_can_be_written(text):
    shown = visible(text)
    shown.encode("utf-8")
    left = {unicodedata.category(character) for character in shown if character not in "\n\t\u200c\u200d"}
    assert not left & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert visible(shown) == shown


@given(st.binary())
def test_bytes_are_text_or_a_sentence_with_a_line(raw):
    try:
        text, message = decode(raw), "line 0"
    except ValueError as error:
        text, message = "", str(error)
    assert "\0" not in text
    assert message.startswith("line ")


def test_the_console_shows_escapes_and_takes_no_word_for_an_emoji_or_a_style():
    out = io.StringIO()
    Console(1, out).say("\x1b[31mred\u202e :smile: [bold]x[/bold] \ud800")
    assert out.getvalue() == "\\x1b[31mred\\u202e :smile: [bold]x[/bold] \\ud800\n"


def test_a_console_of_another_encoding_shows_what_it_does_not_have():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    Console(1, out).say("d\u00e9j\u00e0 \u4e2d")
    out.flush()
    assert raw.getvalue() == b"d\\xe9j\\xe0 \\u4e2d\n"


def test_an_error_on_the_console_acts_on_nothing(tmp_path):
    program = (
        "import sys; from pipeline.commands import main\n"
        "main._fail('the verifier failed on \\x1b[2J\\u202e', 1)\n"
        "main.main(['objectives', 'gspo'])\n"
        "print('\\u4e2d')\n"
        "raise RuntimeError('raised on \\x1b]0;x\\x07 \\ud800')"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=False)
    assert done.returncode == 1
    assert b"\x1b" not in done.stderr + done.stdout
    assert b"sameroute: the verifier failed on \\x1b[2J\\u202e\n" in done.stderr
    assert b"RuntimeError: raised on \\x1b]0;x\\x07 \\ud800" in done.stderr
    assert done.stdout.endswith(b"\\u4e2d\n")


def test_a_long_text_is_shown_in_part_with_its_length():
    assert shortened("é" * 10, 10) == "é" * 10
    assert shortened("é" * 11000, 10) == "é" * 10 + "... (11,000 characters)"
