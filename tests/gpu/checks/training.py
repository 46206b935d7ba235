"""A few steps of the trainer on the device that this process has, told as JSON. Run by itself, because what is patched
in Megatron-Core depends on whether there is a GPU.

    python -m tests.gpu.checks.training DIRECTORY FAMILY DTYPE OUT [--make] [--torch-layers]
    python -m tests.gpu.checks.training DIRECTORY large bfloat16 OUT --make

--make: write random weights into DIRECTORY first, as a Hugging Face directory. large: one step of a model whose memory
is worth measuring. --torch-layers: Transformer Engine is not looked for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

STEPS, SEQUENCES, VOCAB = 4, 8, 1024
_SMALL = {"vocab_size": VOCAB, "hidden_size": 128, "num_hidden_layers": 3, "moe_intermediate_size": 64}
_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
_LATENT = {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 48}
_LATENT |= {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3-30b-a3b", _SMALL | _GROUPED | {"num_experts": 8, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "deepseek-v3",
        _SMALL
        | _LATENT
        | {"intermediate_size": 256, "n_routed_experts": 8, "num_experts_per_tok": 4}
        | {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
    ),
    "glm4_moe": (
        "glm-4.5-air",
        _SMALL | _GROUPED | {"n_routed_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 256},
    ),
    # 1.3 billion parameters: four layers and a quarter of the experts
    "large": ("qwen3-30b-a3b", {"num_hidden_layers": 4, "num_experts": 32}),
}
"""A preset's model, and what of its config.json is made smaller."""


def config_json(family: str) -> dict[str, Any]:
    """Of the smaller model."""
    folder, fields = FAMILIES[family]
    return json.loads(Path("configs", folder, "config.json").read_text()) | fields


def samples(layers: int, experts: int, topk: int, longest: int = 60) -> list:
    """Random tokens and random routes. longest: prompt, and response."""
    from megatron_ext.batch.layout import Sample

    generator, out = np.random.default_rng(0), []
    for _ in range(SEQUENCES):
        prompt, response = (int(n) for n in generator.integers(4, longest, 2))
        tokens = generator.integers(0, VOCAB, prompt + response).astype(np.int32)
        routes = np.argsort(generator.random((len(tokens) - 1, layers, experts)), -1)[..., :topk].astype(np.uint8)
        out.append(Sample(tokens, prompt, routes=routes))
    return out


def train(directory: Path, family: str, dtype: str, *, make: bool) -> dict[str, Any]:
    """Log-probs before, losses, gradient norms and log-probs after, of STEPS steps on the same samples."""
    with _trainer(directory, family, dtype, make=make, tokens=300) as trainer:
        if make:
            _write(trainer, directory)
        model = trainer.policy.model
        batch = samples(model.num_layers, model.num_experts, model.topk)
        before, losses, norms = trainer.logprobs(batch), [], []
        for _ in range(STEPS):
            update = trainer.update(batch, _likelihood)
            losses.append(update.metrics["nll"][0] / update.metrics["nll"][1])
            norms.append(update.grad_norm)
        after = trainer.logprobs(batch)
    flat = [np.concatenate([part.quantities[0][i] for i in range(SEQUENCES)]).tolist() for part in (before, after)]
    routing = [list(counts) for _, counts in sorted(before.routing.items())]
    return {"before": flat[0], "after": flat[1], "losses": losses, "norms": norms, "routing": routing}


def memory(directory: Path, family: str, dtype: str, *, longest: int) -> dict[str, int | None]:
    """Bytes that one step takes, beside what `sameroute plan` says: held between steps, and at the peak.

    longest: of a prompt, and of a response. Measured values are None without a GPU.
    """
    import torch

    from pipeline.plan.memory import rank_memory

    with _trainer(directory, family, dtype, make=True, tokens=SEQUENCES * 2 * longest) as trainer:
        policy = trainer.policy
        model = policy.model
        batch = samples(model.num_layers, model.num_experts, model.topk, longest)
        trainer.update(batch, _likelihood)
        trainer.update(batch, _likelihood)
        cuda = torch.cuda.is_available()
        held, peak = (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) if cuda else (None, None)
        tokens = sum(s.input_length for s in batch)
        plan = rank_memory(model, policy.parallel, policy.config, policy.precision, tokens, stage=0)
    states = plan.weights + plan.gradients + plan.optimizer
    return {
        "held": held,
        "peak": peak,
        "planned_held": int(states),
        "planned_peak": int(states + plan.activations + plan.head),
        "planned_all": int(plan.total),
        "tokens": tokens,
    }


@contextlib.contextmanager
def _trainer(directory: Path, family: str, dtype: str, *, make: bool, tokens: int) -> Iterator[Any]:
    """One rank, its groups made. make: of random weights."""
    from megatron_ext import parallel
    from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig, TrainerPrecision
    from megatron_ext.trainer import Trainer

    if make:
        (directory / "config.json").write_text(json.dumps(config_json(family)))
    with tempfile.TemporaryDirectory() as meeting:
        parallel.initialize(ParallelConfig(), rank=0, init_method=f"file://{meeting}/ranks")
        yield Trainer(
            directory,
            ParallelConfig(),
            TrainerConfig(micro_batch_tokens=tokens, recompute="full"),
            OptimizerConfig(lr=1e-3),
            replay=True,
            precision=TrainerPrecision(weights=dtype),  # pyright: ignore[reportArgumentType]
            load_weights=not make,
        )
        parallel.shutdown()


def _write(trainer: Any, directory: Path) -> None:
    from megatron_ext.hf.writer import write_weights

    tensors = (pair for bucket in trainer.export() for pair in bucket)
    write_weights(trainer.exporter.outputs(), tensors, directory)


def _likelihood(batch):
    logprobs, tokens = (batch.quantities[0] * batch.mask.to(batch.quantities[0].device)).sum(), float(batch.mask.sum())
    return -logprobs / 1000, {"nll": (-float(logprobs.detach()), tokens, "mean")}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("dtype", choices=("float32", "bfloat16"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--torch-layers", action="store_true")
    options = parser.parse_args()
    if options.torch_layers:
        sys.modules["transformer_engine"] = None  # pyright: ignore[reportArgumentType]  # as if it were not installed
    if options.family == "large":
        said = memory(options.directory, "large", options.dtype, longest=1000)
    else:
        said = train(options.directory, options.family, options.dtype, make=options.make)
    from megatron_ext.cpu import torch_layers

    layers = {"layers": "torch" if torch_layers() else "transformer_engine"}
    options.out.write_text(json.dumps(said | layers))


if __name__ == "__main__":
    main()
