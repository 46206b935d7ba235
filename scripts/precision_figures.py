"""What each setting of `precision:` does to the mismatch of two real engines: the table of docs/precision.md.

    .venv/bin/python scripts/precision_figures.py [--prompts 64] [--only head router]

The model of replay_figures.py samples in SGLang under one setting of the block, everything else as in bfloat16 by
default; Megatron-Core computes the same tokens' log-probs with the server's routes, under the same setting and, to show
why one side alone is refused, under another. A row is a server; an indented one the same tokens on another trainer, and
`moved` the mean |change| of the trainer's log-probs by it, nats.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray

from megatron_ext.config import TrainerPrecision
from pipeline.config import load_config
from pipeline.loop.open_loop import open_loop
from pipeline.observe.metrics import mismatch_of
from pipeline.rollout.sampler import sample_groups_sync

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
SETTINGS = ["supervised.steps=0", "model.tiny.experts=16", "model.tiny.init_std=0.15", "rollout.max_new_tokens=48",
            "checks.max_abs_logprob=10"]  # fmt: skip
BF16 = ["precision.weights=bfloat16"]
CASES: dict[str, list[tuple[list[str], list[dict]]]] = {
    "weights": [([], []), (BF16, [])],
    "head": [
        ([*BF16, "precision.head=fp32"], []),
        ([*BF16, "precision.head=fp32_accumulate"], [{"head": "bf16"}]),
        ([*BF16, "precision.head=bf16"], [{"head": "fp32_accumulate"}]),
    ],
    "router": [([*BF16, "precision.router=fp32"], [{"router": "bf16"}]),
               ([*BF16, "precision.router=bf16"], [{"router": "fp32"}])],
    "kv_cache": [(["precision.kv_cache=bfloat16"], [{"kv_cache": "same"}])],
    "rollout_weights": [([*BF16, f"precision.rollout_weights={kind}"], []) for kind in ("int8", "fp8")],
    "temperature": [(["precision.temperature=0.7"], [{"temperature": 1.0}])],
    "sampling": [(["precision.top_k=16", "precision.top_p=0.9"], [{"kept": None}])],
}  # fmt: skip
KEYS = ("abs_logprob", "k3", "f2", "max_abs_logprob")


def compute_with(rank, precision: TrainerPrecision) -> None:
    """Runs in a trainer rank: the policy is built anew with another precision, from the same weights."""
    from megatron_ext.network import Network

    old = rank.trainer.policy
    new = Network(old.model, old.parallel, old.config, precision, trainable=False, replay=bool(old.replays))
    new.copy_from(old)
    rank.trainer.policy = new


def measure(overrides: list[str], others: list[dict], prompts: int) -> None:
    """Print the rows of a server: the trainer with its precision, then each that differs in the named fields."""
    config = load_config(QUICKSTART, [*SETTINGS, *overrides])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "logs").mkdir()
        with open_loop(config, Path(folder), Path(folder) / "logs") as (loop, _):
            sampling = replace(loop.sampling, ignore_eos=True, stop_token_ids=())
            groups = sample_groups_sync(loop.fleet, loop.source.take(prompts), 4, sampling)
            rollouts = [r for g in groups for r in g.rollouts]
            loop.load(rollouts)
            alike = None
            for change in [{}, *others]:
                if "kept" in change:
                    loop.load([replace(r, kept=None) for r in rollouts])
                elif change:
                    precision = config.precision.model_copy(update=change)
                    ray.get([rank.__ray_call__.remote(compute_with, precision) for rank in loop.trainers.ranks])
                seen = [loop.trainers.logprobs(kind) for kind in ("replay", "native")]
                found = [mismatch_of(rollouts, tokens) for tokens in seen]
                logprobs = np.concatenate(seen[0].logprobs)
                alike = logprobs if alike is None else alike
                moved = f"{np.abs(logprobs - alike).mean():10.1e}" if change else ""
                name = " ".join(o.removeprefix("precision.") for o in overrides) or "weights=float32"
                if change:
                    name = "   trainer " + " ".join(f"{k}={v}" for k, v in change.items())
                row = "".join(f"{found[0][f'mismatch/{key}']:10.1e}" for key in KEYS)
                print(f"{name:45}{row}{found[1]['mismatch/k3']:12.1e}{moved}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64, help="prompts, 4 answers of 48 tokens each")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    print(
        f"{'':45}"
        + "".join(f"{key.replace('max_abs_logprob', 'largest'):>10.10}" for key in KEYS)
        + "   native k3     moved"
    )
    for name in options.only:
        for overrides, others in CASES[name]:
            measure(overrides, others, options.prompts)


if __name__ == "__main__":
    main()
