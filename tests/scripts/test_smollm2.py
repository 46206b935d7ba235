"""What becomes of a GGUF file: rows that a rotation turns together, and the tokenizer that is described in it."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.smollm2 import NAME, halves, hf_config, main, tokenizer

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
TOKENS = ["<|end|>", "1", "2", "12", "a", "b", "ab", "\u0120"]
FIELDS = {
    "llama.context_length": 64,
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] + [1] * 7,
    "tokenizer.ggml.merges": ["1 2", "a b"],
    "tokenizer.chat_template": TEMPLATE,
    **{f"tokenizer.ggml.{name}_token_id": 0 for name in ("bos", "eos", "unknown", "padding")},
}
SIZES = {
    "llama.rope.dimension_count": 64, "llama.embedding_length": 576, "llama.attention.head_count": 9,
    "llama.feed_forward_length": 1536, "llama.block_count": 30, "llama.attention.head_count_kv": 3,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06, "llama.rope.freq_base": 1e5,
    "llama.vocab_size": 49152,
}  # fmt: skip


def test_pairs_side_by_side_come_to_stand_half_a_head_apart():
    rows = np.arange(2 * 6, dtype=np.float32)[:, None].repeat(3, 1)
    assert halves(rows, heads=2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_a_digit_is_a_token_and_letters_are_merged_and_nothing_is_lost():
    made = tokenizer(FIELDS)
    assert made.tokenize("ab 12<|end|>12") == ["ab", "\u0120", "1", "2", "<|end|>", "1", "2"]
    assert made.decode(made.encode("ab 12")) == "ab 12"
    assert (made.eos_token, made.chat_template) == ("<|end|>", TEMPLATE)


def test_the_configuration_is_one_that_is_built_here():
    from megatron_ext.hf.description import describe

    hf = hf_config(FIELDS | SIZES)
    model = describe(hf)
    assert (hf["rms_norm_eps"], model.tied_embeddings, model.head_dim, model.rope["rope_theta"]) == (
        1e-5,
        True,
        64,
        1e5,
    )


def test_another_file_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="make language-model puts it there"):
        main(tmp_path, tmp_path / "out")
    (tmp_path / NAME).write_bytes(b"GGUF")
    with pytest.raises(SystemExit, match="is not the file that this was written for"):
        main(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
