"""`sameroute convert`: a conversion from start to end.

Everything that can be known to be wrong is said before a byte is written; the output is there whole or not at all.
Conversions run on the CPU; the caller hides GPUs (CUDA_VISIBLE_DEVICES="") before torch is imported.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import ValidationError

from megatron_ext import parallel
from megatron_ext.checkpoint.names import HF_FOLDER
from megatron_ext.config import ParallelConfig
from megatron_ext.convert.adapted import AdaptedTensors, AdapterReader, adapters_in
from megatron_ext.convert.comparison import Comparison, compare, source_dtype
from megatron_ext.convert.output import OutputError, keep_apart, output_directory, progress, size_text
from megatron_ext.convert.ranks import run_ranks
from megatron_ext.convert.tensors import CheckpointTensors, hf_of_checkpoint, write_checkpoint, write_hf
from megatron_ext.hf.companions import Carried, Dtype, write_companions
from megatron_ext.hf.description import ModelDescription, read_description
from megatron_ext.hf.files import TensorFiles
from megatron_ext.hf.tied import HEAD_NAME, check_tied_head
from megatron_ext.lora.peft import peft_problem, write_peft


@dataclass(frozen=True)
class Report:
    """What a conversion did. carried: tensors that are not trained. compared: None where not asked for."""

    out: Path
    dtype: Dtype
    nbytes: int
    seconds: float
    carried: list[str]
    compared: Comparison | None

    def __str__(self) -> str:
        lines = [f"{self.out}: {size_text(self.nbytes)} of {self.dtype} in {self.seconds:.1f} s"]
        if self.carried:
            lines.append(f"as they were, in the dtype that they had: {len(self.carried)} tensors that are not trained")
        if self.compared is None:
            lines.append("not compared with the source")
        else:
            lines.append(f"read back: {self.compared.tensors} tensors equal the source's, bit for bit after the cast")
            if self.compared.cast:
                lines.append(f"changed by the cast: {len(self.compared.cast)} tensors")
        return "\n".join(lines)


def layout_of(tp: int | None, pp: int | None, vpp: int | None, ep: int | None, etp: int | None) -> ParallelConfig:
    """The smallest layout of these sizes. Raises ValueError where they do not fit together."""
    tensor, pipeline, expert = tp or 1, pp or 1, ep or 1
    try:
        return ParallelConfig(
            ranks=math.lcm(tensor * pipeline, (etp or tensor) * expert * pipeline),
            tensor=tensor,
            sequence=tensor > 1,
            pipeline=pipeline,
            virtual_pipeline=vpp,
            expert=expert,
            expert_tensor=etp,
        )
    except ValidationError as error:
        raise ValueError("; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())) from error


def to_megatron(
    hf_dir: Path,
    out: Path,
    layout: ParallelConfig,
    *,
    dtype: Dtype | None = None,
    verify: bool = True,
    overwrite: bool = False,
) -> Report | None:
    """A model directory into a checkpoint, written by the ranks of a layout (any layout reads it).

    The ranks are processes of this machine; or, where a launcher set RANK and WORLD_SIZE, the processes it started, of
    which all but the first return None.
    dtype: None is the source's. verify: read the checkpoint back and compare.
    """
    began = time.monotonic()
    keep_apart(hf_dir, out)
    model = read_description(hf_dir)
    layout.check_model(model)
    check_tied_head(hf_dir, model)
    files = TensorFiles(hf_dir)
    carried = Carried(hf_dir)
    spare = {*carried.names, *((HEAD_NAME,) if model.tied_embeddings else ())}
    dtype = dtype or source_dtype(files, spare)
    width = {"float32": 4, "bfloat16": 2}[dtype]
    nbytes = sum(math.prod(shape) * width for name, shape in files.shapes.items() if name not in spare)
    nbytes += carried.nbytes
    compared = None
    with contextlib.ExitStack() as stack:
        if "RANK" in os.environ:
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            if world != layout.ranks:
                raise ValueError(f"the launcher started {world} processes; this layout has {layout.ranks} ranks")
            parallel.initialize(layout, rank=rank, init_method="env://")
            stack.callback(parallel.shutdown)
            partial = _agree_on(out, nbytes, overwrite, stack)
            _write_rank(hf_dir, partial, layout, dtype)
            dist.barrier()
            parallel.shutdown()
            if rank:
                return None
        else:
            partial = stack.enter_context(output_directory(out, needed_bytes=nbytes, overwrite=overwrite))
            run_ranks(_write_rank, layout, hf_dir, partial, layout, dtype)
        write_companions(hf_dir, partial / HF_FOLDER, dtype)
        if verify:
            results: list[Comparison] = []
            run_ranks(_compare_checkpoint, ParallelConfig(), partial, model, files, nbytes, results)
            (compared,) = results
    return Report(out, dtype, nbytes, time.monotonic() - began, carried.names, compared)


def _write_rank(hf_dir: Path, partial: Path, layout: ParallelConfig, dtype: Dtype) -> None:
    """On a rank: its part. The first rank shows its progress."""
    watch = functools.partial(progress, "writing", shown=dist.get_rank() == 0)
    write_checkpoint(hf_dir, partial, layout, dtype, watch)


def _agree_on(out: Path, nbytes: int, overwrite: bool, stack: contextlib.ExitStack) -> Path:
    """The first rank makes the directory; all ranks learn of it, or of why not."""
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [stack.enter_context(output_directory(out, needed_bytes=nbytes, overwrite=overwrite))]
        except OutputError as error:
            answer = [error]
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], OutputError):
        raise answer[0]
    return answer[0]


def _compare_checkpoint(
    partial: Path, model: ModelDescription, files: TensorFiles, nbytes: int, results: list[Comparison]
) -> None:
    with progress("comparing", nbytes) as advance:
        compared = compare(CheckpointTensors(partial, model), files, to_hf=False, advance=advance)
        compared.add(compare(Carried(partial / HF_FOLDER), files, to_hf=True, advance=advance))
        results.append(compared)


def to_hf(
    checkpoint: Path,
    out: Path,
    *,
    hf_dir: Path | None = None,
    dtype: Dtype | None = None,
    shard_bytes: int = 1 << 30,
    verify: bool = True,
    overwrite: bool = False,
    base: Path | None = None,
) -> Report:
    """A checkpoint, written in any layout, into a model directory; adapters are merged into their model.

    hf_dir: configuration and tokenizer, where they are not in the checkpoint. base: see `adapters_in`.
    dtype:  None is the checkpoint's. shard_bytes: of one safetensors file, but for a larger tensor.
    """
    began = time.monotonic()
    companions = hf_of_checkpoint(checkpoint, hf_dir)
    keep_apart(checkpoint, out)
    keep_apart(companions, out)
    results: list[Report] = []
    origin = adapters_in(checkpoint, base)
    if origin is not None:
        keep_apart(origin.base, out)

    def convert() -> None:
        model = read_description(companions)
        tensors = CheckpointTensors(checkpoint, model) if origin is None else AdaptedTensors(checkpoint, model, origin)
        target = dtype or tensors.dtype
        width = {"float32": 4, "bfloat16": 2}[target]
        carried = Carried(companions)
        nbytes = sum(t.numel() * width for _, t in tensors.outputs()) + carried.nbytes
        compared = None
        with output_directory(out, needed_bytes=nbytes, overwrite=overwrite) as partial:
            write_companions(companions, partial, target)  # first: what it carries is in the index of the weights
            with progress("writing", nbytes) as advance:
                write_hf(tensors, partial, target, shard_bytes, advance)
            if verify:
                with progress("comparing", nbytes) as advance:
                    written = TensorFiles(partial)
                    compared = compare(tensors, written, to_hf=True, advance=advance)
                    compared.add(compare(carried, written, to_hf=True, advance=advance))
        results.append(Report(out, target, nbytes, time.monotonic() - began, carried.names, compared))

    run_ranks(convert, ParallelConfig())
    return results[0]


def to_peft(checkpoint: Path, out: Path, *, base: Path | None = None, overwrite: bool = False) -> Path:
    """The adapters of a checkpoint, written in any layout, into a directory that PEFT reads. Returns it.

    base: see `adapters_in`. Raises ValueError where PEFT has no form for them.
    """
    keep_apart(checkpoint, out)
    origin = adapters_in(checkpoint, base)
    if origin is None:
        raise ValueError(f"{checkpoint} holds a whole model and no adapters; write it with to-hf")
    keep_apart(origin.base, out)
    model = read_description(hf_of_checkpoint(checkpoint, None))
    if (problem := peft_problem(model, origin.lora)) is not None:
        raise ValueError(f"{checkpoint} is not written for PEFT: {problem}; write the merged model with to-hf")

    def convert() -> None:
        read = AdapterReader(checkpoint)
        nbytes = sum(tensor.size.numel() * tensor.properties.dtype.itemsize for tensor in read.stored.values())
        with output_directory(out, needed_bytes=nbytes, overwrite=overwrite) as partial:
            write_peft(partial, model, origin.lora, str(origin.base), read)

    run_ranks(convert, ParallelConfig())
    return out
