"""The trained model as the weights of a Hugging Face directory: a stream of tensors becomes safetensors files of
bounded size, which count once all are written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

SHARD_BYTES = 5 << 30
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def has_weights(directory: Path) -> bool:
    """Whether `write_weights` has come to its end there."""
    return (directory / _WHOLE).is_file() or (directory / _INDEX).is_file()


def write_weights(buckets: Iterable[list[tuple[str, Tensor]]], directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or numbered shards and their index where one file would be too large.

    buckets: (Hugging Face name, tensor) lists.
    shard_bytes: of one file, at most, but for a larger tensor; about as much memory is needed.
    What last appears is what `has_weights` looks for. Raises OSError or SafetensorError.
    """
    shards: list[dict[str, str]] = []  # of each: name -> nothing yet; the file is known when all are counted
    held: dict[str, Tensor] = {}
    sizes: list[int] = []

    def flush() -> None:
        from safetensors.torch import save_file

        if held:
            save_file(held, _partial(directory, len(shards)), metadata={"format": "pt"})
            sizes.append(sum(t.nbytes for t in held.values()))
            shards.append(dict.fromkeys(held, ""))
            held.clear()

    for bucket in buckets:
        for name, tensor in bucket:
            if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > shard_bytes:
                flush()
            held[name] = tensor.detach().clone().contiguous().cpu()
    flush()
    if len(shards) == 1:
        os.replace(_partial(directory, 0), directory / _WHOLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(_partial(directory, number), directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
    partial = directory / f".{_INDEX}.partial"
    partial.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, directory / _INDEX)


def _partial(directory: Path, number: int) -> Path:
    return directory / f".model-{number}.safetensors.partial"
