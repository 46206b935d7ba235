"""Seconds and memory of `sameroute convert`, against copying the files and casting every tensor once.

    .venv/bin/python scripts/bench_convert.py [--layers 24] [--repeat 2] [--folder /tmp]

The model is a random Qwen3-MoE in bfloat16, 2.2 billion parameters by default (4.4 GB). The copy reads and writes
blocks of 16 MB; the casts are one `to(float32)` of every tensor. Both sides end with their bytes on the disk (fsync),
and begin with none of them in memory: the page cache is dropped before each, which needs root. Otherwise who comes
later finds what another has read, and pages that another has freed, on a virtual machine five times faster than new
ones. A copy goes before every conversion. Seconds of a conversion are those that it prints; its start, a few seconds of
imports, is beside them. Memory is the largest resident set of the process, pages of mapped files included. Needs five
times the model on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

BLOCK = 16 << 20


MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 65536,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "moe_intermediate_size": 768,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def make_model(folder: Path, layers: int) -> int:
    """Write it, a layer a file; returns its parameters."""
    config = MODEL | {"num_hidden_layers": layers}
    width, inner, head = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    parameters = 0

    def write(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal parameters
        file = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        tensors = {
            n: torch.empty(s, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator) for n, s in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        parameters += sum(t.numel() for t in tensors.values())

    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes: dict[str, tuple[int, ...]] = {
            f"{at}input_layernorm.weight": (width,),
            f"{at}post_attention_layernorm.weight": (width,),
            f"{at}self_attn.q_proj.weight": (query, width),
            f"{at}self_attn.k_proj.weight": (key, width),
            f"{at}self_attn.v_proj.weight": (key, width),
            f"{at}self_attn.o_proj.weight": (width, query),
            f"{at}self_attn.q_norm.weight": (head,),
            f"{at}self_attn.k_norm.weight": (head,),
            f"{at}mlp.gate.weight": (config["num_experts"], width),
        }
        for expert in range(config["num_experts"]):
            shapes[f"{at}mlp.experts.{expert}.gate_proj.weight"] = (inner, width)
            shapes[f"{at}mlp.experts.{expert}.up_proj.weight"] = (inner, width)
            shapes[f"{at}mlp.experts.{expert}.down_proj.weight"] = (width, inner)
        write(layer + 1, shapes)
    table = (config["vocab_size"], width)
    ends = {"model.embed_tokens.weight": table, "model.norm.weight": (width,), "lm_head.weight": table}
    write(layers + 1, ends)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return parameters


def settle() -> None:
    """Everything on the disk, and nothing of it in memory."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        raise SystemExit(f"the page cache cannot be dropped ({error.strerror}); run it as root") from error


def copy(source: Path, target: Path) -> float:
    """Seconds of a copy in blocks, its bytes on the disk at the end. The copy is removed."""
    target.mkdir()
    settle()
    began = time.perf_counter()
    for file in sorted(source.iterdir()):
        with open(file, "rb") as reading, open(target / file.name, "wb") as writing:
            while block := reading.read(BLOCK):
                writing.write(block)
            writing.flush()
            os.fsync(writing.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def cast(source: Path) -> float:
    """Seconds of one cast of every tensor to float32."""
    began = time.perf_counter()
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (no mapping)
                handle.get_tensor(name).to(torch.float32)
    return time.perf_counter() - began


def convert(*arguments: object) -> tuple[float, float, float]:
    """(seconds of the conversion, seconds of the process, largest resident set in GB)."""
    settle()
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.commands.main", "convert", *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    whole = time.perf_counter() - began
    found = re.search(r" in ([\d.]+) s", text)
    if status or not found:
        raise SystemExit(f"sameroute convert {' '.join(map(str, arguments))} failed")
    return float(found[1]), whole, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files go")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        model, checkpoint, back = root / "model", root / "checkpoint", root / "back"
        model.mkdir()
        parameters = make_model(model, options.layers)
        nbytes = sum(f.stat().st_size for f in model.iterdir())
        print(f"{parameters / 1e9:.2f} billion parameters, {nbytes / 1e9:.2f} GB")
        rows: dict[str, list[tuple[float, float, float]]] = {}
        baseline = []
        for _ in range(options.repeat):
            for label, arguments in {
                "to-megatron": ("to-megatron", model, checkpoint, "--overwrite", "--no-verify"),
                "to-megatron, compared": ("to-megatron", model, checkpoint, "--overwrite"),
                "to-hf": ("to-hf", checkpoint, back, "--overwrite", "--no-verify"),
                "to-hf, compared": ("to-hf", checkpoint, back, "--overwrite"),
            }.items():
                baseline.append((copy(model, root / "copy"), cast(model)))
                print("copy {:.1f} s, casts {:.1f} s".format(*baseline[-1]), flush=True)
                rows.setdefault(label, []).append(convert(*arguments))
                seconds, whole, memory = rows[label][-1]
                print(f"{label}: {seconds:.1f} s, process {whole:.1f} s, {memory:.2f} GB", flush=True)
        expected = statistics.median(a + b for a, b in baseline)
        print(f"\ncopy and casts: {expected:.1f} s")
        for label, runs in rows.items():
            seconds, whole, memory = (statistics.median(values) for values in zip(*runs, strict=True))
            print(f"{label:24} {seconds:6.1f} s  {seconds / expected:.2f} x  process {whole:6.1f} s  {memory:.2f} GB")


if __name__ == "__main__":
    main()
