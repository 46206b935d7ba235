"""The safetensors of a Hugging Face model directory, read a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ext.hf.mxfp4 import dequantise
from megatron_ext.hf.writer import CHECKSUMS_KEY, checksum

_REOPEN_BYTES = 1 << 30


class DamagedModel(ValueError):
    """A file of the model directory is cut off or is no safetensors file; the message names it."""


class TensorFiles:
    """Tensors of a model directory by name.

    Files are mapped into memory, and mapped anew after every GiB, so that what was read does not stay there.
    A file that has checksums in its header is held against them, whenever a tensor is read as a whole.
    Tensors stored as `X_blocks` and `X_scales` (MXFP4) are here one tensor X, in bfloat16; `mxfp4` has their names.
    """

    def __init__(self, path: Path, only: str | None = None):
        """Open every file once, or the one of this name. Raises FileNotFoundError or DamagedModel, naming the file, and
        KeyError for a tensor that the index names and its file does not have."""
        self.path, self.files = path, _tensor_files(path) if only is None else _tensors_of(path / only)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # as safetensors names them: "BF16"
        self._handles: dict[Path, safe_open] = {}
        self._read = 0
        names: dict[Path, set[str]] = {}
        for name, file in self.files.items():
            names.setdefault(file, set()).add(name)
        for file, expected in names.items():
            handle = self._open(file)
            if absent := sorted(expected - set(handle.keys())):
                raise KeyError(f"{file} lacks tensors that the index names: {', '.join(absent)}")
            for name in expected:
                view = handle.get_slice(name)
                self.shapes[name], self.dtypes[name] = tuple(view.get_shape()), view.get_dtype()
        self._stored = dict(self.files)
        stems = {name.removesuffix("_blocks") for name, dtype in self.dtypes.items() if dtype == "U8"}
        self.mxfp4 = sorted(s for s in stems if {s + "_blocks", s + "_scales"} <= self.files.keys())
        for name in self.mxfp4:
            *experts, rows, groups, pairs = self.shapes[name + "_blocks"]
            self.files[name] = self.files[name + "_blocks"]
            self.shapes[name], self.dtypes[name] = (*experts, groups * pairs * 2, rows), "BF16"
            for part in (name + "_blocks", name + "_scales"):
                del self.files[part], self.shapes[part], self.dtypes[part]

    def described(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Name -> tensor of its shape and dtype, without storage; dtypes that are written from here."""
        dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        return {name: torch.empty(self.shapes[name], dtype=dtypes[self.dtypes[name]], device="meta") for name in names}

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def read(self, name: str, part: int | None = None) -> Tensor:
        """A tensor, or what stands at `part` of its first dimension, of which nothing else is read."""
        if name in self.mxfp4:
            return dequantise(*(self._read_stored(name + kind, part) for kind in ("_blocks", "_scales")))
        return self._read_stored(name, part)

    def _read_stored(self, name: str, part: int | None) -> Tensor:
        if self._read > _REOPEN_BYTES:
            self._handles.clear()
            self._read = 0
        file = self._open(self._stored[name])
        tensor = file.get_tensor(name) if part is None else file.get_slice(name)[part]
        self._read += tensor.nbytes
        sums = (file.metadata() or {}).get(CHECKSUMS_KEY)
        if sums is not None and part is None and json.loads(sums)[name] != checksum(tensor):
            raise DamagedModel(f"{self._stored[name]} is damaged: the checksum of {name} is wrong")
        return tensor

    def _open(self, file: Path) -> safe_open:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, "pt")
            except SafetensorError as error:
                raise DamagedModel(f"{file} is damaged: {error}") from error
        return self._handles[file]


def _tensor_files(path: Path) -> dict[str, Path]:
    """Every tensor's name and the file that holds it. Raises FileNotFoundError where there is none."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = {name: path / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        absent = sorted({file.name for file in files.values() if not file.is_file()})
        if absent:
            raise FileNotFoundError(f"{path} lacks files that its index names: {', '.join(absent)}")
        return files
    single = path / "model.safetensors"
    if not single.is_file():
        raise FileNotFoundError(f"{path} holds neither {index.name} nor {single.name}")
    return _tensors_of(single)


def _tensors_of(file: Path) -> dict[str, Path]:
    try:
        with safe_open(file, "pt") as opened:
            return dict.fromkeys(opened.keys(), file)
    except SafetensorError as error:
        raise DamagedModel(f"{file} is damaged: {error}") from error
