"""A Hugging Face model directory without its weights: what stands beside them when a model is written.

The one writer of such directories, for a run's `hf/`, a checkpoint's and a conversion's. Its config.json says what the
weights beside it are, or will be, and not what the source's were.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from megatron_ext.hf.config_json import read_hf_config

Dtype = Literal["float32", "bfloat16"]

_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot",
    ".npz", ".nemo", ".distcp", ".tflite", ".mlmodel",
}  # fmt: skip
_FOLDERS = ("additional_chat_templates", "custom_generate")
"""What transformers reads in a folder of its own."""
_DTYPE_NAMES = ("dtype", "torch_dtype")
"""transformers 5 calls it by the first, earlier files and readers by the second."""


def write_companions(source: Path, target: Path, dtype: Dtype) -> None:
    """Everything of the model directory `source` but weights into `target`, which is made where it is not there.

    Copied: configuration, tokenizer, chat templates, generation settings, code, licence. config.json names `dtype`, in
    which the weights are written, and neither quantization nor layers that are not written.
    Raises FileNotFoundError for a source without config.json, ValueError where that is no JSON, OSError.
    """
    config = exported_config(read_hf_config(source), dtype)
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not _holds_weights(file.name):
            shutil.copyfile(file, target / file.name)
    for folder in _FOLDERS:
        if (source / folder).is_dir():
            shutil.copytree(source / folder, target / folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def exported_config(hf: dict[str, Any], dtype: Dtype) -> dict[str, Any]:
    """config.json of a model written from here: in this dtype, not quantized, without multi-token-prediction layers."""
    names = [name for name in _DTYPE_NAMES if name in hf] or _DTYPE_NAMES[:1]
    drafts = {"num_nextn_predict_layers": 0} if hf.get("num_nextn_predict_layers") else {}
    return {k: v for k, v in hf.items() if k != "quantization_config"} | drafts | dict.fromkeys(names, dtype)


def _holds_weights(name: str) -> bool:
    """Whether a file holds weights, or says where they are: `tf_model.h5`, `model.safetensors.index.json`,
    `model.ckpt.index`, `model.ckpt.data-00000-of-00001`."""
    return Path(name).suffix in _WEIGHTS or name.endswith(".index.json") or ".ckpt." in name
