"""A Hugging Face model directory into this rank's shards, one tensor at a time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.hf.description import ModelDescription
from megatron_ext.hf.files import TensorFiles
from megatron_ext.hf.params import local_parameters, shard_position
from megatron_ext.hf.tables import EMBEDDING, LM_HEAD, Match
from megatron_ext.hf.tied import check_tied_head
from megatron_ext.mcore import GPTModel
from megatron_ext.progress import WEIGHTS

log = logging.getLogger(__name__)


Parameters = list[tuple[str, Tensor, Match]]


@torch.no_grad()
def load_hf(chunks: Sequence[GPTModel], model: ModelDescription, path: str | Path, *, value_head: bool = False) -> None:
    """Copy a model directory into the chunks. All ranks call it together.

    value_head: the chunks end in a value head, which stays as it is; the directory's LM head is not read.

    Raises FileNotFoundError and DamagedModel, and as `check_tensors` does.
    """
    files = TensorFiles(Path(path))
    parameters = local_parameters(chunks, model, value_head=value_head)
    check_tensors(files, parameters, model, value_head=value_head)
    WEIGHTS.begin(sum(parameter.nbytes for _, parameter, _ in parameters))
    for _, parameter, match in parameters:
        parameter.copy_(read_shard(files, match, model))
        WEIGHTS.add(parameter.nbytes)


def read_shard(files: TensorFiles, match: Match, model: ModelDescription) -> Tensor:
    """This rank's shard of one parameter, in the dtype of the files."""
    return match.row.transform.shard([files.read(n, match.part) for n in match.hf_names], model, *shard_position(match))


def check_tensors(
    files: TensorFiles, parameters: Parameters, model: ModelDescription, *, value_head: bool = False
) -> None:
    """Whether the directory holds exactly this model, before a value is read. All ranks call it together.

    Raises KeyError naming the tensors that are missing, or that no rank had a place for, ValueError where a shape
    differs, and as `check_tied_head` does. Nothing is skipped, but tensors that are `Carried`, and an LM head that is
    the embedding once more; these are logged, as are tensors that come in fewer bits than they are read in.
    """
    used = {name for _, _, match in parameters for name in match.hf_names}
    if missing := sorted((used | model.family.indexers(model.hf)) - files.files.keys()):
        raise KeyError(f"{files.path} lacks tensors of {model.model_type}: {', '.join(missing)}")
    head = set(LM_HEAD.hf) & files.files.keys() if value_head or model.tied_embeddings else set()
    if head and not value_head:
        if not used.isdisjoint(EMBEDDING.hf):  # a rank that holds it
            check_tied_head(files.path, model)
        if dist.get_rank() == 0:
            log.info("%s of %s is its embedding, and is left out", ", ".join(head), files.path)
    for name, parameter, match in parameters:
        tensors = [torch.empty(files.shapes[n], device="meta") for n in match.hf_names]
        if match.part is not None:
            for hf_name, tensor in zip(match.hf_names, tensors, strict=True):
                if len(tensor) != model.num_experts:
                    raise ValueError(f"{hf_name} holds {len(tensor)} experts; the model has {model.num_experts}")
            tensors = [t[match.part] for t in tensors]
        try:
            shard = tuple(match.row.transform.shard(tensors, model, *shard_position(match)).shape)
        except RuntimeError:  # shapes that do not even join
            shard = "that does not join"
        if shard != parameter.shape:
            given = ", ".join(f"{n} {list(files.shapes[n])}" for n in match.hf_names)
            raise ValueError(f"{given} give {name} a shape {shard}; the model has {tuple(parameter.shape)}")
    if carried := model.family.carried(model.hf, files.files):
        used.update(carried)
        if dist.get_rank() == 0:
            told = "%d tensors of %s are not trained, and stay in what is written as they are: %s"
            log.info(told, len(carried), files.path, ", ".join(carried))
    if files.mxfp4 and dist.get_rank() == 0:
        told = "%d MXFP4 tensors of %s are read as bfloat16; what is written from here is not quantized"
        log.warning(told, len(files.mxfp4), files.path)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, used)
    if unknown := sorted(files.files.keys() - head.union(*everyone)):
        raise KeyError(f"{files.path} holds tensors that {model.model_type} has no place for: {', '.join(unknown)}")
