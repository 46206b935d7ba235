"""The tokenizer of a Hugging Face model directory, checked to be the one that the directory means.

transformers picks a class by the model's type, by `tokenizer_class`, by `auto_map`, and takes another where it does not
know that one. What comes out may cut text otherwise than the model was trained on, without a word: a policy would then
learn on text that it has never seen so. Two things say which one is meant. `auto_map` names Python code of the model's
own, which runs only where the user asked for it. `tokenizer.json` holds the whole tokenizer, so what was loaded must
cut a few lines of text as that file does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.chat import DataError
from pipeline.text.characters import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERIC = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")  # with and without Fast
_PROBES = (
    "Natalia sold 48 clips in April, and half as many (24) in May: 48+24=72.",
    "  two  blanks\n\n\tdef f(x):\n        return x[0]['key'] ** 2  # 1234567 3.14159\r\n",
    "It's; they'll, WE'RE don't... \u201cquoted\u201d \u2014 caf\u00e9 na\u00efve \u00dcber",
    "\u4e2d\u6587\u5206\u8bcd 12\u4e07 \u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \U0001f600\U0001f469\u200d\U0001f4bb",
)


def read_json(file: Path) -> dict[str, Any]:
    """The object that a file holds. Raises DataError, naming the file: it is not text, not JSON, or no object."""
    try:
        value = json.loads(decode(file.read_bytes()))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}, is not JSON: {error.msg}") from error
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{file}, {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{file} must hold an object, not {str(value)[:40]!r}")
    return value


def load_tokenizer(directory: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; nothing is downloaded.

    trust_remote_code: run the directory's own Python code where `auto_map` of tokenizer_config.json names some.
    Raises DataError where the directory holds no tokenizer, or one that needs code that may not run, does not load, or
    is another than the files mean.
    """
    directory = Path(directory)
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        raise DataError(f"{directory} holds no tokenizer: it has no tokenizer_config.json")
    settings = read_json(file)
    code = own_code(settings)
    if code is not None and not trust_remote_code:
        raise DataError(
            f"the tokenizer of {directory} is Python code of the model's own ({code}, by auto_map in {file.name}); "
            "read that code, then set model.trust_remote_code=true to run it"
        )
    try:
        tokenizer = _load(directory, settings, trust_remote_code=code is not None)
    # transformers, tokenizers (which raises Exception itself) and a model's own code raise what they like.
    except Exception as error:
        raise DataError(f"the tokenizer of {directory} does not load: {type(error).__name__}: {error}") from error
    _check_class(tokenizer, directory, settings, code)
    _check_cuts(tokenizer, directory)
    return tokenizer


def own_code(settings: dict[str, Any]) -> str | None:
    """`module.Class` that auto_map of a tokenizer_config.json names, the fast one first; None where it names none."""
    named = settings.get("auto_map")
    named = named.get("AutoTokenizer") if isinstance(named, dict) else named
    choices = [named] if isinstance(named, str) else list(reversed(named or []))
    return next((str(choice) for choice in choices if choice), None)


def _load(directory: Path, settings: dict[str, Any], *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if settings.get("tokenizer_class") == "PreTrainedTokenizerFast" and not trust_remote_code:
        # AutoTokenizer imports the configs of all model families first: 7 s more on two cores.
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(directory), local_files_only=True, trust_remote_code=trust_remote_code or None
    )


def _check_class(
    tokenizer: PreTrainedTokenizerBase, directory: Path, settings: dict[str, Any], code: str | None
) -> None:
    """Raise DataError where the class that was loaded is not the one that tokenizer_config.json names.

    A class of transformers' own may stand for another one where tokenizer.json holds the tokenizer: `_check_cuts` then
    says whether it is the same one.
    """
    import transformers

    named = code.rpartition(".")[2] if code is not None else settings.get("tokenizer_class")
    loaded = type(tokenizer).__name__.removesuffix("Fast")
    if not isinstance(named, str) or named.removesuffix("Fast") in (*_GENERIC, loaded):
        return
    known = hasattr(transformers, named) or hasattr(transformers, named.removesuffix("Fast"))
    if code is None and known and (directory / "tokenizer.json").is_file():
        return
    raise DataError(
        f"{directory / 'tokenizer_config.json'} names the tokenizer class {named}, and transformers loads {loaded} in "
        "its place, which may cut text otherwise; take the tokenizer's files from a release with a tokenizer.json"
    )


def _check_cuts(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Raise DataError where the tokenizer cuts text otherwise than tokenizer.json, if there is one, says."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        return
    from tokenizers import Tokenizer

    meant = Tokenizer.from_file(str(file))
    for probe in _PROBES:
        expected = meant.encode(probe, add_special_tokens=False).ids
        got = tokenizer(probe, add_special_tokens=False)["input_ids"]
        if got != expected:
            where = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), len(expected))
            raise DataError(
                f"the tokenizer of {directory} loads as {type(tokenizer).__name__}, which cuts text otherwise than "
                f"tokenizer.json says, at token {where} of {probe!r}; correct tokenizer_class in tokenizer_config.json "
                "(PreTrainedTokenizerFast takes tokenizer.json as it is)"
            )
