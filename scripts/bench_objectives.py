"""What an objective costs in a training step: seconds of its loss and of the loss's backward, and of the whole update.

    .venv/bin/python -m scripts.bench_objectives [--sequences 16] [--tokens 512] [--only gspo grpo ...]

One rank of the real trainer updates a small mixture-of-experts model on a CPU. The loss is timed inside the update; its
backward is timed apart, on tensors of the same shapes, because in the update it is part of the model's backward.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import numpy as np
import torch

from megatron_ext.batch.layout import Sample
from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from pipeline.config.model import TinyModelConfig
from pipeline.data.tiny_model import make_tiny_model
from pipeline.objectives import PRESETS, Denominators, LossInputs, Objective, ObjectiveConfig, resolve
from tests.support.ranks import run_ranks

HIDDEN = TinyModelConfig(layers=4, hidden=256, experts=16, topk=4, moe_intermediate=256)


def make_samples(sequences: int, tokens: int) -> list[Sample]:
    """Random responses with the discrepancy and the staleness of a real run: log-ratios of about 0.02 and 0.1."""
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(sequences):
        values = {
            "rollout_logprobs": rng.normal(-4, 0.02, tokens).astype(np.float32),
            "proximal_logprobs": rng.normal(-4, 0.1, tokens).astype(np.float32),
            "advantage": float(rng.normal()),
            "prompt_tokens": float(4 * tokens),
        }
        ids = rng.integers(3, 64, tokens + 8).astype(np.int32)
        samples.append(Sample(ids, 8, values=values))
    return samples


def inputs_of(batch, current: torch.Tensor) -> LossInputs:
    """A micro-batch's; pi_o is put near pi, so that no clip takes everything."""
    noise = batch.values["proximal_logprobs"] + 4
    return LossInputs(
        current_logprobs=current,
        proximal_logprobs=current.detach() + noise,
        rollout_logprobs=current.detach() + noise + batch.values["rollout_logprobs"] + 4,
        advantages=batch.values["advantage"],
        mask=batch.mask,
        prompt_tokens=batch.values["prompt_tokens"],
    )


def measure(config: ParallelConfig, model: str, names: list[str], sequences: int, tokens: int, repeats: int):
    """Runs on the rank: preset -> median seconds of an update, of its loss, of the loss's backward."""
    from megatron_ext.trainer import Trainer

    trainer = TrainerConfig(micro_batch_tokens=4 * (tokens + 8))
    it = Trainer(model, config, trainer, OptimizerConfig(lr=1e-6), replay=False)
    samples = make_samples(sequences, tokens)
    denominators = Denominators(sequences, sequences * tokens, max_length=tokens, prompts=max(1, sequences // 4))
    out = {}
    for name in names:
        objective = resolve(ObjectiveConfig(preset=name))
        rows = []
        for _ in range(repeats + 1):
            spent = [0.0, 0.0]

            def loss(batch, objective=objective, spent=spent):
                start = time.perf_counter()
                share = objective.policy_loss(inputs_of(batch, batch.quantities[0]), denominators)
                spent[0] += time.perf_counter() - start
                spent[1] += _backward_seconds(objective, batch, denominators)
                return share.loss, {}

            start = time.perf_counter()
            it.update(samples, loss)
            rows.append((time.perf_counter() - start - spent[1], *spent))
        out[name] = [statistics.median(column) for column in zip(*rows[1:], strict=True)]
    return out


def _backward_seconds(objective: Objective, batch, denominators: Denominators) -> float:
    with torch.enable_grad():
        current = batch.quantities[0].detach().requires_grad_()
        loss = objective.policy_loss(inputs_of(batch, current), denominators).loss
        start = time.perf_counter()
        torch.autograd.grad(loss, current)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=["grpo", "gspo", "minirl"], choices=list(PRESETS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_tiny_model(folder, HIDDEN, seed=0))
        (out,) = run_ranks(measure, ParallelConfig(), model, args.only, args.sequences, args.tokens, args.repeats)
    print(
        f"{args.sequences} responses x {args.tokens} tokens, float32, one CPU core; medians of {args.repeats} updates"
    )
    print(f"{'preset':22}{'update s':>9}{'loss ms':>9}{'backward ms':>13}{'of the update':>15}")
    for name, (update, forward, backward) in out.items():
        share = (forward + backward) / update
        print(f"{name:22}{update:9.2f}{1e3 * forward:9.2f}{1e3 * backward:13.2f}{share:15.2%}")


if __name__ == "__main__":
    main()
