"""The text model of a published Qwen3.5-MoE, as a Hugging Face directory of its own: what is trained and served here.

    .venv/bin/python scripts/text_of_qwen_3_5.py HF_DIR OUT

HF_DIR is as published: a model of pictures beside the text model, whose fields stand under `text_config` in
config.json, whose tensors are called `model.language_model.…`, and whose layers hold all experts in two tensors. OUT
gets the text model alone: its config.json, its tensors by their own names, an expert at a time, every bit and dtype as
it was, the layers that predict a second token (`mtp.…`), and the tokenizer. One tensor is held at a time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ext.convert.output import keep_apart, output_directory
from megatron_ext.hf.companions import write_companions
from megatron_ext.hf.config_json import read_hf_config
from megatron_ext.hf.description import describe
from megatron_ext.hf.files import TensorFiles
from megatron_ext.hf.writer import write_weights

_PICTURES, _TEXT = "model.visual.", "model.language_model."
_OF_PICTURES = ("preprocessor_config.json", "video_preprocessor_config.json")
_GATE_UP, _DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"


def text_config(hf: dict[str, Any]) -> dict[str, Any]:
    """config.json of the text model. Raises ValueError for another model, and UnsupportedModel."""
    if hf.get("model_type") != "qwen3_5_moe" or not isinstance(hf.get("text_config"), dict):
        raise ValueError(
            f"config.json is of model_type {hf.get('model_type')!r}; give a published directory of Qwen3.5-MoE, "
            "whose model_type is qwen3_5_moe and which has a text_config"
        )
    text = {"tie_word_embeddings": hf.get("tie_word_embeddings", False)} | hf["text_config"]
    text |= {"architectures": ["Qwen3_5MoeForCausalLM"], "dtype": text.get("dtype") or hf.get("dtype") or "bfloat16"}
    describe(text, "text_config")
    return text


def tensors(files: TensorFiles, *, values: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that is written, in the same order with values and without storage."""
    for name in sorted(files.files):
        if name.startswith(_PICTURES):
            continue
        own = "model." + name.removeprefix(_TEXT) if name.startswith(_TEXT) else name
        if own.startswith("model.") and own.endswith((_GATE_UP, _DOWN)):
            yield from _experts(files, name, own, values=values)
        else:
            yield own, files[name] if values else files.described([name])[name]


def _experts(files: TensorFiles, name: str, own: str, *, values: bool) -> Iterator[tuple[str, Tensor]]:
    """Of one packed tensor: gate and up [experts, 2 width, hidden], one behind the other, or down
    [experts, hidden, width]."""
    module, _, kind = own.rpartition(".")
    packed = files.described([name])[name]
    for expert in range(len(packed)):
        one = files.read(name, expert) if values else packed[expert]
        if kind == "down_proj":
            yield f"{module}.{expert}.down_proj.weight", one
            continue
        gate, up = one.chunk(2)
        yield f"{module}.{expert}.gate_proj.weight", gate
        yield f"{module}.{expert}.up_proj.weight", up


def write(source: Path, out: Path) -> None:
    """Raises ValueError, FileNotFoundError, UnsupportedModel and OutputError, OUT whole or not there at all."""
    keep_apart(source, out)
    config = text_config(read_hf_config(source))
    files = TensorFiles(source)
    nbytes = sum(tensor.nbytes for _, tensor in tensors(files, values=False))
    with output_directory(out, needed_bytes=nbytes) as partial:
        write_companions(source, partial, config["dtype"])
        for name in _OF_PICTURES:
            (partial / name).unlink(missing_ok=True)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_weights(tensors(files, values=False), tensors(files, values=True), partial)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        write(Path(sys.argv[1]), Path(sys.argv[2]))
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        sys.exit(f"text_of_qwen_3_5: {error}")
