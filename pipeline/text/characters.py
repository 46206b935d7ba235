"""Text from files and from models: bytes that are no text are named, characters that act on a terminal are shown."""

from __future__ import annotations

import re
import unicodedata

# Beginnings of files that are no text, and what to do with each.
_KINDS = (
    (b"\x1f\x8b", "gzip", "unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unpack it with unzstd"),
    (b"BZh", "bzip2", "unpack it with bunzip2"),
    (b"\xfd7zXZ\x00", "xz", "unpack it with unxz"),
    (b"PK\x03\x04", "zip", "unpack it with unzip"),
    (b"PAR1", "Parquet", "write it as text, with pandas.read_parquet(...).to_json(..., orient='records', lines=True)"),
    (b"ARROW1", "Arrow", "write it as text, with pandas.read_feather(...).to_json(..., orient='records', lines=True)"),
    (b"\xff\xfe\x00\x00", "UTF-32", "write it as UTF-8, with iconv -f UTF-32 -t UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32", "write it as UTF-8, with iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16", "write it as UTF-8, with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16", "write it as UTF-8, with iconv -f UTF-16 -t UTF-8"),
)
_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile("[\ud800-\udfff]")

# They join letters and emoji into what a reader expects to see, and move nothing else.
_JOINERS = "\u200c\u200d"
_SHOWN_BY_CATEGORY = ("Cc", "Cf", "Cs", "Zl", "Zp")


def decode(raw: bytes) -> str:
    """The text of a file in UTF-8, without a byte-order mark. Raises ValueError, which says what the file is instead,
    or names the first line that is not UTF-8 or holds a NUL byte."""
    return decode_lines(raw[text_start(raw) :])


def text_start(raw: bytes) -> int:
    """Bytes of the byte-order mark that the beginning of a file has. Raises ValueError for another kind of file."""
    for beginning, kind, instead in _KINDS:
        if raw.startswith(beginning):
            raise ValueError(f"line 1: the file is {kind}, not text in UTF-8; {instead}")
    return len(_BOM) if raw.startswith(_BOM) else 0


def decode_lines(raw: bytes, first: int = 1) -> str:
    """Lines of a file, of which the first has the number `first`. Raises ValueError, which names a line that is not
    UTF-8 or holds a NUL byte."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + first
        raise ValueError(
            f"line {line}: the byte 0x{raw[error.start]:02x} is not UTF-8; write the file as UTF-8, for example with "
            "iconv -f LATIN1 -t UTF-8"
        ) from error
    if (at := text.find("\0")) >= 0:
        line = text.count("\n", 0, at) + first
        raise ValueError(f"line {line}: there is a NUL byte; the file is no text, or UTF-16 without its mark")
    return text


def has_surrogate(text: str) -> bool:
    """Whether a text holds half of a UTF-16 pair, which no file in UTF-8 can hold."""
    return not text.isascii() and _SURROGATE.search(text) is not None


def shortened(text: str, limit: int = 1000) -> str:
    """At most `limit` characters of a text, and how many it had: a programming problem may have megabytes of tests."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def visible(text: str) -> str:
    """The text with every character that acts in place of being seen written as `\\x1b`, `\\u202e` or `\\U000e0041`:
    control characters but newline and tab, direction marks, zero-width characters, halves of UTF-16 pairs.

    What a model writes may not move the cursor of a terminal, change its title, or turn the direction of a page. The
    result can always be written as UTF-8. A backslash stays one, so the escapes are for reading, not for parsing back.
    """
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character.isprintable() or character in "\n\t" or character in _JOINERS:
        return character
    if unicodedata.category(character) not in _SHOWN_BY_CATEGORY:
        return character  # another kind of blank, or one that this Python does not know
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
