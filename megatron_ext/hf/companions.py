"""A Hugging Face model directory without the trainer's weights: what stands beside them when a model is written.

The one writer of such directories, for a run's `hf/`, a checkpoint's and a conversion's. Its config.json says what the
weights beside it are, or will be, and not what the source's were. Tensors that the trainer does not build come along.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_ext.hf.config_json import DRAFT_LAYERS, draft_tensors, read_hf_config
from megatron_ext.hf.families import FAMILIES
from megatron_ext.hf.families.family import Family

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

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

    Copied: configuration, tokenizer, chat templates, generation settings, code, licence, and the tensors that are
    `Carried`, into a file of their own. config.json names `dtype`, in which the weights are written, and neither
    quantization nor layers that are not written.
    Raises FileNotFoundError for a source without config.json, ValueError where that is no JSON, OSError, and as
    `Carried` does.
    """
    carried = Carried(source)
    config = exported_config(read_hf_config(source), dtype, drafts=carried.drafts)
    target.mkdir(parents=True, exist_ok=True)
    carried.write(target)
    for file in sorted(source.iterdir()):
        if file.is_file() and not _holds_weights(file.name):
            shutil.copyfile(file, target / file.name)
    for folder in _FOLDERS:
        if (source / folder).is_dir():
            shutil.copytree(source / folder, target / folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def exported_config(hf: dict[str, Any], dtype: Dtype, *, drafts: bool = False) -> dict[str, Any]:
    """config.json of a model written from here: in this dtype, not quantized. drafts: its multi-token-prediction layers
    are written too."""
    names = [name for name in _DTYPE_NAMES if name in hf] or _DTYPE_NAMES[:1]
    without = {} if drafts else {name: 0 for name in DRAFT_LAYERS if hf.get(name)}
    return {k: v for k, v in hf.items() if k != "quantization_config"} | without | dict.fromkeys(names, dtype)


class Carried:
    """Tensors of a model that the trainer does not build, and every model written from here has as they came, in the
    dtype that they have: multi-token-prediction layers, which draft for speculative decoding, and indexers, which
    choose the tokens that attention sees (Family.indexer).

    No update moves them. Draft layers are no part of the policy, and no route is replayed in them.
    """

    def __init__(self, folder: Path):
        """Of a model directory, among whose weights they are, or of the `hf` folder of a checkpoint, whose file of
        them has checksums. Raises as `read_hf_config` and `TensorFiles` do, and ValueError for another dtype than
        float32, bfloat16 and float16, and where indexers are missing."""
        hf = read_hf_config(folder)
        self.names: list[str] = []
        family, named = FAMILIES.get(hf.get("model_type", "")), any(hf.get(name) for name in DRAFT_LAYERS)
        indexers = family.indexers(hf) if family else set()
        if named or indexers or (family and family.drafts):
            self._find(folder, hf, family)
        if missing := sorted(indexers.difference(self.names)):
            raise ValueError(f"{folder} lacks tensors of {hf['model_type']}: {', '.join(missing)}")
        self.drafts = len(self.names) > len(indexers)
        """Whether some belong to draft layers."""
        if named and not self.drafts:
            log.warning("%s has no tensors of multi-token-prediction layers, though its config.json names some", folder)

    def _find(self, folder: Path, hf: dict[str, Any], family: Family | None) -> None:
        from megatron_ext.hf.files import TensorFiles
        from megatron_ext.hf.writer import CARRIED, has_weights

        if (folder / CARRIED).is_file():
            self._files = TensorFiles(folder, CARRIED)
        elif has_weights(folder):
            self._files = TensorFiles(folder)
        else:
            return
        found = self._files.files
        self.names = draft_tensors(hf, found) if family is None else family.carried(hf, found)
        if odd := [name for name in self.names if self._files.dtypes[name] not in ("F32", "BF16", "F16")]:
            raise ValueError(f"{odd[0]} is {self._files.dtypes[odd[0]]}; write it in float32, bfloat16 or float16")

    @property
    def nbytes(self) -> int:
        width = {"F32": 4, "BF16": 2, "F16": 2}
        return sum(math.prod(self._files.shapes[name]) * width[self._files.dtypes[name]] for name in self.names)

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor), each once. Raises DamagedModel where a checksum is wrong."""
        for name in self.names:
            yield name, self._files[name]

    def write(self, target: Path) -> None:
        """Into a file of their own, or, where there are none, no such file. Raises OSError."""
        from megatron_ext.hf.writer import CARRIED, write_carried

        if self.names:
            write_carried(self._files.described(self.names), self.stream(), target)
        else:
            (target / CARRIED).unlink(missing_ok=True)


def _holds_weights(name: str) -> bool:
    """Whether a file holds weights, or says where they are: `tf_model.h5`, `model.safetensors.index.json`,
    `model.ckpt.index`, `model.ckpt.data-00000-of-00001`."""
    return Path(name).suffix in _WEIGHTS or name.endswith(".index.json") or ".ckpt." in name
