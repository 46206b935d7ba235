"""Tokenizers for tiny models, made on the spot: one of characters and one of bytes.

characters  64 ids, for the synthetic tasks: digits, small letters and signs. A wrong digit is one wrong token.
bytes       320 ids, for any text: each byte of its UTF-8 is a token.

Neither has merges, so there is nothing to learn. Roles of a chat are one token each. Every id of the vocabulary has a
token: a model cannot sample one that decodes to nothing.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from pipeline.config.model import TINY_VOCABULARIES, TinyTokenizer
from pipeline.data.pretrained import load_tokenizer

__all__ = [
    "CHARACTERS",
    "VOCAB_SIZE",
    "load_tokenizer",
    "special_tokens",
    "write_character_tokenizer",
    "write_tokenizer",
]

PAD, EOS, BOS, UNKNOWN = "<|pad|>", "<|eos|>", "<|bos|>", "<|unk|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
CHARACTERS = string.digits + string.ascii_lowercase + " \n+-*/=().,:;?!"
VOCAB_SIZE = TINY_VOCABULARIES["characters"]

# No bos: the role token in front serves as one, and a prompt stays one token shorter.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('the role of a message is system, user, assistant or tool, not ' ~ message.role) }}"
    "{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def special_tokens(kind: TinyTokenizer = "characters") -> list[str]:
    """Special tokens in the order of their ids, from 0; reserved ones fill the vocabulary."""
    named = [PAD, EOS, BOS, UNKNOWN, *ROLES]
    others = len(CHARACTERS) if kind == "characters" else 256
    reserved = TINY_VOCABULARIES[kind] - len(named) - others
    return named + [f"<|reserved_{i}|>" for i in range(reserved)]


def write_character_tokenizer(directory: str | Path) -> Path:
    """`write_tokenizer` of the kind "characters"."""
    return write_tokenizer(directory, "characters")


def write_tokenizer(directory: str | Path, kind: TinyTokenizer) -> Path:
    """Write a tokenizer's Hugging Face files, special tokens first; returns the directory.

    transformers is not imported; `load_tokenizer` reads the files as a PreTrainedTokenizerFast.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = special_tokens(kind)
    symbols = CHARACTERS if kind == "characters" else sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *symbols])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
    if kind == "bytes":
        # The whole text is one word: there are no merges that a cut could keep apart.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(specials)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "bos_token": BOS,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory
