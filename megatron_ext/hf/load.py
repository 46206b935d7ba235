"""A Hugging Face model directory into this rank's shards, one tensor at a time."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from megatron_ext.hf.config import ModelShape, draft_tensors
from megatron_ext.hf.params import dims_of, local_parameters, shard_position
from megatron_ext.hf.tables import LM_HEAD
from megatron_ext.mcore import GPTModel

log = logging.getLogger(__name__)


def tensor_files(path: Path) -> dict[str, Path]:
    """Every tensor's name and the safetensors file that holds it. Raises FileNotFoundError where there is none."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return {name: path / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = path / "model.safetensors"
    if not single.is_file():
        raise FileNotFoundError(f"{path} holds neither {index.name} nor {single.name}")
    with safe_open(single, "pt") as f:
        return dict.fromkeys(f.keys(), single)


@torch.no_grad()
def load_hf(
    chunks: Sequence[GPTModel], hf: dict[str, Any], shape: ModelShape, path: str | Path, *, value_head: bool = False
) -> None:
    """Copy a model directory into the chunks. All ranks call it together.

    value_head: the chunks end in a value head, which stays as it is; the directory's LM head is not read.

    Raises KeyError naming the tensors that are missing, or that no rank had a place for, and ValueError where a shape
    differs. Nothing is skipped, but the tensors of multi-token-prediction layers, which are logged.
    """
    files, dims, used = tensor_files(Path(path)), dims_of(hf, shape), set()
    if drafts := draft_tensors(hf, files):
        used.update(drafts)
        if dist.get_rank() == 0:
            log.warning("%d multi-token-prediction tensors of %s left out: %s", len(drafts), path, ", ".join(drafts))
    parameters = local_parameters(chunks, shape, value_head=value_head)
    missing = sorted({n for _, _, match in parameters for n in match.hf_names} - files.keys())
    if missing:
        raise KeyError(f"{path} lacks tensors of {shape.family}: {', '.join(missing)}")
    with contextlib.ExitStack() as stack:
        handles = {file: stack.enter_context(safe_open(file, "pt")) for file in set(files.values())}
        for name, parameter, match in parameters:
            tensors = [handles[files[n]].get_tensor(n) for n in match.hf_names]
            used.update(match.hf_names)
            shard = match.row.transform.shard(tensors, dims, *shard_position(match))
            if shard.shape != parameter.shape:
                raise ValueError(
                    f"{', '.join(match.hf_names)} give {name} the shape {tuple(shard.shape)}; "
                    f"the model has {tuple(parameter.shape)}"
                )
            parameter.copy_(shard)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, used)
    head = set(LM_HEAD.hf) if value_head else set()
    unknown = sorted(files.keys() - head.union(*everyone))
    if unknown:
        raise KeyError(f"{path} holds tensors that {shape.family} has no place for: {', '.join(unknown)}")
