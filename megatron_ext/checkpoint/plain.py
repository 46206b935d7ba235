"""Reading a checkpoint directory of unknown origin: what is in it is data, and runs no code.

Three parts of one are pickles, and a pickle may call any function there is: `.metadata`, objects in the ranks' files
(counters, generators), and `common.pt` of older checkpoints. torch (2.14.1) reads the first with `pickle.load` and the
second with `weights_only=False`. Here the first may name the classes of torch's own description and no others, and
torch's own restricted unpickler, which builds tensors and plain containers, reads the rest.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from unittest.mock import patch

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_ext.checkpoint.names import CheckpointError

_DESCRIPTION = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *(
        (_DESCRIPTION, name)
        for name in (
            "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
            "BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # a look-up by name
    *((path, name) for path in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")),
    ("collections", "OrderedDict"),
}  # fmt: skip
_DAMAGE = (
    pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, MemoryError, OverflowError,
    RecursionError, TypeError, ValueError,
)  # fmt: skip
"""What pickle raises where bytes are cut off or changed."""


class _Description(pickle.Unpickler):
    """Of `.metadata`."""

    def find_class(self, module: str, name: str, /) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise CheckpointError(f"it asks for {module}.{name}, which no description of a checkpoint needs")


def _load(stream: IO[bytes]) -> Metadata:
    """In the place of pickle.load. Raises CheckpointError, which names the file."""
    file = getattr(stream, "name", "a checkpoint's .metadata")
    try:
        metadata = _Description(stream).load()
    except CheckpointError as error:
        raise CheckpointError(f"{file} is refused: {error}") from error
    except _DAMAGE as error:
        raise CheckpointError(f"{file} is cut off or damaged: {error}") from error
    stored = getattr(metadata, "storage_data", None)
    if not isinstance(metadata, Metadata) or not isinstance(stored, dict):
        raise CheckpointError(f"{file} is damaged: it describes no checkpoint")
    for index, info in stored.items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, filesystem._StorageInfo):
            raise CheckpointError(f"{file} is damaged: it describes no checkpoint")
        if Path(info.relative_path).name != info.relative_path:
            raise CheckpointError(f"{file} is refused: it names {info.relative_path}, a file outside its directory")
    return metadata


def read_metadata(path: Path) -> Metadata:
    """`.metadata` of a checkpoint directory. Raises CheckpointError where it is not there, damaged, or asks for more
    than data."""
    try:
        with (path / ".metadata").open("rb") as stream:
            return _load(stream)
    except OSError as error:
        raise CheckpointError(f"{path / '.metadata'} cannot be read: {error}") from error


@contextlib.contextmanager
def plain_data(path: Path) -> Iterator[None]:
    """Until the block ends, what torch and Megatron-Core read of a checkpoint is data.

    Raises CheckpointError where it is not, or where `.metadata` is damaged.
    """
    restricted = SimpleNamespace(load=_load, dump=pickle.dump)
    with (
        patch.object(filesystem, "pickle", restricted),
        _environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD="1", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=None),
        torch.serialization.safe_globals([io.BytesIO]),
    ):
        try:
            yield
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path} is refused or damaged: {explained(error)}") from error
        except CheckpointException as error:  # torch's wrapping of what ranks raised
            for cause, _ in error.failures.values():
                if isinstance(cause, CheckpointError):
                    raise cause from error
                if isinstance(cause, pickle.UnpicklingError):
                    raise CheckpointError(f"{path} is refused or damaged: {explained(cause)}") from error
            raise


@contextlib.contextmanager
def _environment(**variables: str | None) -> Iterator[None]:
    """Variables of this process until the block ends; None: without it. No other is touched: threads read them."""
    before = {name: os.environ.get(name) for name in variables}

    def become(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    become(variables)
    try:
        yield
    finally:
        become(before)


def explained(error: Exception) -> str:
    """In half a line what is wrong with a pickle; torch's restricted unpickler says on many what it met."""
    asked = re.search(r"(?:GLOBAL|global:?|class) ([\w.]+\.[\w.]+)", str(error))
    return (
        f"it asks for {asked[1]}, which is no data" if asked else (str(error) or type(error).__name__).splitlines()[0]
    )
