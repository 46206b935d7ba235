"""A tied model whose files hold an LM head all the same: right where it is the embedding, bit for bit or widened.

Some published models store the one matrix twice. It may stand in another file or in another dtype. Neither torch nor
safetensors is here, and numpy only where there are matrices to compare, so that a configuration is checked with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.hf.description import ModelDescription, UnsupportedModel

if TYPE_CHECKING:
    import numpy as np

EMBEDDING_NAME, HEAD_NAME = "model.embed_tokens.weight", "lm_head.weight"
_CHUNK = 1 << 24  # elements, or bytes, compared at once
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


@dataclass(frozen=True)
class _Stored:
    """A tensor in a safetensors file. start: its first byte in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def bytes(self) -> np.ndarray:
        """[nbytes] uint8, mapped."""
        import numpy as np

        return np.memmap(self.file, np.uint8, "r", self.start, (self.nbytes,))

    def floats(self) -> Iterator[np.ndarray]:
        """Its elements a chunk at a time, none rounded."""
        import numpy as np

        kind = np.dtype("<u2") if self.dtype == "BF16" else np.dtype(_FLOATS[self.dtype])
        values = self.bytes().view(kind)
        for at in range(0, values.size, _CHUNK):
            chunk = values[at : at + _CHUNK]
            yield (chunk.astype("<u4") << 16).view("<f4") if self.dtype == "BF16" else chunk


def check_tied_head(path: str | Path, model: ModelDescription) -> None:
    """Raise UnsupportedModel where embeddings are tied and the directory's LM head is another matrix.

    Nothing is read, and nothing raised, where they are not tied, or where there is no LM head or no embedding: who
    loads the weights says what is missing. Raises ValueError for a file that is cut off or is no safetensors file.
    """
    if not model.tied_embeddings:
        return
    head, embedding = (_find(Path(path), name) for name in (HEAD_NAME, EMBEDDING_NAME))
    if head is None or embedding is None or (difference := _difference(head, embedding)) is None:
        return
    raise UnsupportedModel(
        f"{path}: tie_word_embeddings is true, and {HEAD_NAME} is not {EMBEDDING_NAME}: {difference}. Write "
        f"tie_word_embeddings=false in config.json if the model has two matrices; if it has one, leave {HEAD_NAME} out"
    )


def _difference(head: _Stored, embedding: _Stored) -> str | None:
    """What differs, or None."""
    import numpy as np

    if head.shape != embedding.shape:
        return f"the shapes are {list(head.shape)} and {list(embedding.shape)}"
    ours, theirs = head.bytes(), embedding.bytes()
    chunks = (slice(at, at + _CHUNK) for at in range(0, head.nbytes, _CHUNK))
    if head.dtype == embedding.dtype and all(np.array_equal(ours[chunk], theirs[chunk]) for chunk in chunks):
        return None
    if unread := sorted({head.dtype, embedding.dtype} - {"BF16", *_FLOATS}):
        return f"the dtype {' and '.join(unread)} is not compared"
    done = 0
    for ours, theirs in zip(head.floats(), embedding.floats(), strict=True):
        if (wrong := np.flatnonzero(ours != theirs)).size:
            row = (done + int(wrong[0])) // head.shape[-1]
            return f"row {row} is the first that differs ({head.dtype} and {embedding.dtype})"
        done += ours.size
    return None


def _find(path: Path, name: str) -> _Stored | None:
    """A tensor of a model directory. None where the directory, its index or a file does not have it."""
    index, file = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        named = json.loads(index.read_text())["weight_map"].get(name)
        file = path / named if named is not None else None
    if file is None or not file.is_file():
        return None
    damaged = ValueError(f"{file} is damaged: it is cut off, or is no safetensors file")
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > size - 8:
            raise damaged
        try:
            entry = json.loads(opened.read(length)).get(name)
        except ValueError as error:
            raise damaged from error
    if entry is None:
        return None
    start, end = entry["data_offsets"]
    if 8 + length + end > size:
        raise damaged
    return _Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
