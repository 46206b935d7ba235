"""Adapters as the PEFT library has them (0.21.2): adapter_config.json, and adapter_model.safetensors with an A and a B
of each projection under its Hugging Face name.

    base_model.model.model.layers.3.mlp.experts.5.up_proj.lora_A.weight    [r, in]
    base_model.model.model.layers.3.mlp.experts.5.up_proj.lora_B.weight    [out, r]

Transformers 5 holds the experts of a layer in two tensors; PEFT joins the adapters of experts as it does, when it reads
them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.config import LoraConfig
from megatron_ext.hf.description import ModelDescription
from megatron_ext.hf.tables import Match
from megatron_ext.hf.writer import SafetensorsWriter
from megatron_ext.lora.targets import choose_targets, group_of, layer_name, layers_with, projection

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Read = Callable[[str], Tensor]
"""From "decoder.layers.3.self_attention.linear_qkv.A" to the whole tensor; see lora.adapter."""


def peft_problem(model: ModelDescription, lora: LoraConfig) -> str | None:
    """Why these adapters are not written for PEFT; None: they are."""
    if lora.router == "trained":
        return "the routers that were trained beside the adapters (lora.router) are no adapters"
    if any(target.row.packed for target in choose_targets(model, lora)):
        return f"PEFT has no name for an expert of {model.model_type}, whose layers hold all experts in one tensor"
    return None


def peft_tensors(model: ModelDescription, lora: LoraConfig, read: Read) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor), each once."""
    for target in choose_targets(model, lora):
        for layer in layers_with(target.row, model):
            name = layer_name(Match(target.row, layer, None))
            a, b = read(f"{name}.A"), read(f"{name}.B")
            for expert in range(len(a)):
                module = Match(target.row, layer, expert if target.row.expert else None).hf_names
                parts = target.row.transform.merge([b[expert].flatten(0, 1)], model)
                for place, part in enumerate(target.parts):
                    prefix = f"base_model.model.{module[part].removesuffix('.weight')}"
                    yield f"{prefix}.lora_A.weight", a[expert, place].contiguous()
                    yield f"{prefix}.lora_B.weight", parts[part].contiguous()


def peft_config(model: ModelDescription, lora: LoraConfig, base: str) -> dict[str, Any]:
    """The content of adapter_config.json. base: the model's path or name."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": _target_modules(model, lora),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _target_modules(model: ModelDescription, lora: LoraConfig) -> list[str] | str:
    """Names of projections; a pattern where one name is of modules with and without adapters."""
    everything, chosen = LoraConfig(), choose_targets(model, lora)
    mine = {(group_of(t.row), projection(t.row.hf[p])) for t in chosen for p in t.parts}
    others = {(group_of(t.row), projection(n)) for t in choose_targets(model, everything) for n in t.row.hf} - mine
    names = sorted({name for _, name in mine})
    if not {name for _, name in others} & set(names):
        return names
    full = sorted({t.row.hf[p].removesuffix(".weight") for t in chosen for p in t.parts})
    patterns = [name.replace(".", r"\.").replace("{layer}", r"\d+").replace("{expert}", r"\d+") for name in full]
    return f".*({'|'.join(patterns)})"


def write_peft(directory: Path, model: ModelDescription, lora: LoraConfig, base: str, read: Read) -> None:
    """Both files, into a directory that exists. Raises OSError."""
    sizes: dict[str, Tensor] = {}
    for name, tensor in peft_tensors(model, lora, read):
        sizes[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    partial = directory / f".{WEIGHTS}.partial"
    with open(partial, "wb") as stream:
        writer = SafetensorsWriter(stream, sizes)
        for name, tensor in peft_tensors(model, lora, read):
            writer.write(name, tensor)
    os.replace(partial, directory / WEIGHTS)
    tree = peft_config(model, lora, base)
    (directory / CONFIG).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
