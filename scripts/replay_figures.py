"""What replay does to the mismatch of two real engines: the figure and the numbers of docs/router-replay.md.

    .venv/bin/python scripts/replay_figures.py [--dtype bfloat16] [--prompts 64] [--out docs/figures]

A random Qwen3-MoE (4 layers, 16 experts, top 2, weights of std 0.15, so that experts differ as much as trained ones do)
samples in SGLang; Megatron-Core computes the same tokens' log-probs with native routing and with the server's routes.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.config import load_config
from pipeline.loop.open_loop import open_loop
from pipeline.observe.metrics import mismatch_of
from pipeline.rollout.sampler import sample_groups_sync

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
SETTINGS = ["supervised.steps=0", "model.tiny.experts=16", "model.tiny.init_std=0.15", "rollout.max_new_tokens=48",
            "checks.max_abs_logprob=10"]  # fmt: skip
KEYS = ("k3", "abs_logprob", "p99", "max_abs_logprob", "f2", "chi2_sequence")


def measure(dtype: str, prompts: int) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]], np.ndarray]:
    """Token log-ratios and mismatch by kind of routing, and the routers' counts [layers, 4] under replay."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "logs").mkdir()
        config = load_config(QUICKSTART, [*SETTINGS, f"precision.weights={dtype}"])
        with open_loop(config, Path(folder), Path(folder) / "logs") as (loop, _):
            sampling = replace(loop.sampling, ignore_eos=True, stop_token_ids=())
            groups = sample_groups_sync(loop.fleet, loop.source.take(prompts), 4, sampling)
            rollouts = [r for g in groups for r in g.rollouts]
            loop.load(rollouts)
            native, replayed = (loop.trainers.logprobs(routing) for routing in ("native", "replay"))
    mu = np.concatenate([r.rollout_logprobs for r in rollouts])
    both = {"native": native, "replayed": replayed}
    ratios = {name: np.concatenate(tokens.logprobs) - mu for name, tokens in both.items()}
    return ratios, {name: mismatch_of(rollouts, tokens) for name, tokens in both.items()}, replayed.routing


def draw(ratios: dict[str, np.ndarray], routing: np.ndarray, path: Path) -> None:
    """Agreement by layer beside the distribution of |log-ratio|."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    disagree = 100 * (1 - routing[:, 1] / routing[:, 0])
    left.bar(np.arange(1, len(disagree) + 1), disagree, color="#1b6ca8")
    left.set_xticks(np.arange(1, len(disagree) + 1))
    left.set_xlabel("layer")
    left.set_ylabel("tokens with another expert set, %")
    left.set_title("what the trainer's own routers would have chosen", fontsize=10)
    bins = np.logspace(-5, 1, 61)
    for name, colour in (("native", "#d1495b"), ("replayed", "#1b6ca8")):
        right.hist(np.abs(ratios[name]), bins, histtype="step", linewidth=1.6, color=colour, label=name)
    right.axvline(np.log(2), color="#4d4d4d", linestyle=":", linewidth=1)
    right.text(np.log(2) * 1.1, 2, "ratio 2", fontsize=8, color="#4d4d4d")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_ylim(0.7)
    right.set_xlabel("|log pi_o - log mu| of a token, nats")
    right.set_ylabel("tokens")
    right.set_title("the engines' discrepancy, by routing", fontsize=10)
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of both engines")
    parser.add_argument("--prompts", type=int, default=64, help="prompts, 4 answers of 48 tokens each")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    options = parser.parse_args()
    ratios, mismatch, routing = measure(options.dtype, options.prompts)
    print(f"{options.dtype}, {len(ratios['native'])} tokens")
    print(f"{'':18}{'native':>12}{'replayed':>12}")
    for key in KEYS:
        print(f"{key:18}" + "".join(f"{mismatch[name][f'mismatch/{key}']:12.2e}" for name in ratios))
    agreement = routing[:, 1] / routing[:, 0]
    print("agreement by layer: " + ", ".join(f"{a:.2%}" for a in agreement))
    draw(ratios, routing, options.out / "router_replay.png")


if __name__ == "__main__":
    main()
