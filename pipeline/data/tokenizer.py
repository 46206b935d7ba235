"""A character-level tokenizer of 64 ids for the synthetic tasks, made on the spot.

One character is one token: no merges, nothing to learn, and a wrong digit is one wrong token. Roles of a chat are one
token each. Every id of the vocabulary has a token, so a model of 64 logits cannot sample an id that decodes to nothing.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.model import TINY_VOCABULARY
from pipeline.data.chat import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, EOS, BOS, UNKNOWN = "<|pad|>", "<|eos|>", "<|bos|>", "<|unk|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHARACTERS = string.digits + string.ascii_lowercase + " \n+-*/=().,:;?!"
VOCAB_SIZE = TINY_VOCABULARY

# No bos: the role token in front serves as one, and a prompt stays one token shorter.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the role of a message is system, user or assistant, not ' ~ message.role) }}"
    "{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def special_tokens() -> list[str]:
    """Special tokens in the order of their ids, from 0; reserved ones fill the vocabulary up to VOCAB_SIZE."""
    named = [PAD, EOS, BOS, UNKNOWN, *ROLES]
    reserved = VOCAB_SIZE - len(named) - len(CHARACTERS)
    return named + [f"<|reserved_{i}|>" for i in range(reserved)]


def write_character_tokenizer(directory: str | Path) -> Path:
    """Write the tokenizer's Hugging Face files (special tokens first, then CHARACTERS); returns the directory.

    transformers is not imported; `load_tokenizer` reads the files as a PreTrainedTokenizerFast.
    """
    from tokenizers import Tokenizer, decoders, models

    specials = special_tokens()
    vocab = {token: i for i, token in enumerate([*specials, *CHARACTERS])}
    characters = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
    characters.decoder = decoders.Fuse()
    characters.add_special_tokens(specials)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "bos_token": BOS,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    characters.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face model directory; nothing is downloaded.

    Raises DataError where the directory holds none.
    """
    directory = Path(directory)
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        raise DataError(f"{directory} holds no tokenizer: it has no tokenizer_config.json")
    if json.loads(file.read_text()).get("tokenizer_class") == "PreTrainedTokenizerFast":
        # AutoTokenizer imports the configs of all model families first: 7 s more on two cores.
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
