"""The figures of docs/objectives.md and the numbers in its text, from exact enumeration.

    .venv/bin/python -m scripts.objectives_figures [--out docs/figures]

Everything is a sum over all sequences of a small policy (tests/support/enumeration.py), or a closed form; nothing
is sampled. Takes about half a minute on one core.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from pipeline.objectives import Objective, ObjectiveConfig, resolve
from pipeline.objectives.correction_config import CORRECTION_BOUNDS
from tests.support.enumeration import (
    Tree,
    coefficients,
    expected_gradient,
    gradient_of_mean,
    logprobs,
    probabilities,
    tree,
)

UNCLIPPED = {"clip_low": 1.0, "clip_high": 1e9}
"""The bias of a ratio is shown without its clip, which would hide it."""

ESTIMATORS: dict[str, tuple[dict, dict]] = {
    "token ratio, 1/N (GRPO)": ({"preset": "grpo", **UNCLIPPED}, {"color": "tab:red"}),
    "sequence ratio, 1/N (GSPO)": ({"preset": "gspo", **UNCLIPPED}, {"color": "tab:purple", "linestyle": "--"}),
    "no importance sampling": ({"preset": "reinforce", "correction": []}, {"color": "0.55"}),
    "token ratio truncated at 1.2 (TIS)": (
        {"preset": "reinforce", "correction": {"kind": "token_tis", "high": 1.2, "numerator": "current"}},
        {"color": "tab:green", "linestyle": "--"},
    ),
    "token ratio (Dr.GRPO, DAPO, REINFORCE)": ({"preset": "reinforce"}, {"color": "tab:blue"}),
    "sequence ratio (Dr.GSPO)": ({"preset": "dr_gspo", **UNCLIPPED}, {"color": "tab:orange"}),
}
SEEDS = range(6)
NEAR = 0.1
"""Size of the move of the logits wherever one distance is shown."""


def _policy(length: int, seed: int = 0) -> tuple[Tree, Tensor, Tensor, Tensor]:
    """All sequences up to a length, a random policy, a direction to move it, and centred rewards of 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    sequences = tree(vocabulary=3, length=length)
    base = torch.randn(sequences.rows, 3, generator=generator, dtype=torch.float64)
    base[:, 0] -= 2  # so that most responses are long
    direction = torch.randn(sequences.rows, 3, generator=generator, dtype=torch.float64)
    rewards = (torch.arange(len(sequences.tokens)) % 2).double()[
        torch.randperm(len(sequences.tokens), generator=generator)
    ]
    mean = (probabilities(logprobs(base, sequences)) * rewards).sum()
    return sequences, base, direction, rewards - mean


def _objective(config: dict) -> Objective:
    return resolve(ObjectiveConfig.model_validate(config))


def relative_bias(config: dict, delta: float, length: int, seed: int = 0) -> float:
    """How far the mean gradient points and scales away from the true one: ||g / (g.t/t.t) - t|| / ||t||.

    The scale that the optimiser would absorb (1/N makes every step smaller) is taken out first.
    """
    sequences, base, direction, advantages = _policy(length, seed)
    logits = base + delta * direction
    mu, current = logprobs(base, sequences), logprobs(logits, sequences)
    proximal = current if config.get("correction") == [] else mu
    c = coefficients(_objective(config), current, proximal, mu, advantages, sequences.mask)
    gradient = expected_gradient(c, probabilities(mu), logits, sequences)
    truth = gradient_of_mean(advantages, logits, sequences)
    scale = (gradient * truth).sum() / truth.square().sum()
    return ((gradient / scale - truth).norm() / truth.norm()).item()


def k3_of_distance(delta: float, length: int, seed: int = 0) -> float:
    """The mean of e^l - 1 - l per sampled token, l = log pi - log mu: what mismatch/k3 would show, nats."""
    sequences, base, direction, _ = _policy(length, seed)
    mu = logprobs(base, sequences)
    log_ratio = logprobs(base + delta * direction, sequences) - mu
    p = probabilities(mu)
    return ((p[:, None] * (log_ratio.expm1() - log_ratio)).sum() / (p * sequences.lengths).sum()).item()


def mean_bias(config: dict, delta: float, length: int) -> float:
    """relative_bias, averaged over policies."""
    return sum(relative_bias(config, delta, length, seed) for seed in SEEDS) / len(SEEDS)


def bias(path: Path) -> None:
    deltas = torch.logspace(-2, 0, 9).tolist()
    lengths = range(2, 10)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), sharey=True)
    distances = [sum(k3_of_distance(delta, 6, seed) for seed in SEEDS) / len(SEEDS) for delta in deltas]
    left.axvspan(7.5e-4, 1.5e-3, color="0.92", linewidth=0)
    for label, (config, style) in ESTIMATORS.items():
        left.loglog(distances, [mean_bias(config, delta, 6) for delta in deltas], label=label, **style)
        right.semilogy(lengths, [mean_bias(config, NEAR, length) for length in lengths], marker="o", ms=3, **style)
    left.set(xlabel="distance of pi from mu: k3 per token, nats", ylabel="bias of the gradient, relative")
    left.set(ylim=(3e-3, 3), title="at most 6 tokens (grey: published engine mismatch)")
    k3 = sum(k3_of_distance(NEAR, 6, seed) for seed in SEEDS) / len(SEEDS)
    right.set(xlabel="longest response, tokens", title=f"k3 = {k3:.1g}")
    right.legend(*left.get_legend_handles_labels(), fontsize=7.5, frameon=False, loc="lower right")
    for axis in (left, right):
        axis.title.set_fontsize(10)
    _save(figure, path)


def _token_moments(mu: Tensor, pi: Tensor, length: int) -> tuple[float, float, float]:
    """Var of prod r_t, of 1 + sum delta_t and of 1 + N (s - 1), for `length` tokens drawn alike."""
    ratio = pi / mu

    def moment(power: float) -> float:
        return (mu * ratio**power).sum().item()

    product = moment(2) ** length - 1
    return (
        product,
        length * (moment(2) - 1),
        length**2 * (moment(2 / length) ** length - moment(1 / length) ** (2 * length)),
    )


MU_TOKEN = torch.tensor([0.05, 0.45, 0.5], dtype=torch.float64)
SKEWS: dict[str, Tensor] = {
    "pi likes the rare token more: skewed right": torch.tensor([0.065, 0.4425, 0.4925], dtype=torch.float64),
    "pi likes the rare token less: skewed left": torch.tensor([0.035, 0.4575, 0.5075], dtype=torch.float64),
    "pi finds the rare token impossible": torch.tensor([0.0005, 0.47475, 0.52475], dtype=torch.float64),
}


def variance(path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.6), sharey=True)
    lengths = [2**k for k in range(14)]
    for axis, (title, pi) in zip(axes, SKEWS.items(), strict=True):
        values = [_token_moments(MU_TOKEN, pi, length) for length in lengths]
        for k, (label, colour) in enumerate(
            [("prod r (sequence IS)", "tab:red"), ("1 + sum (r - 1)", "tab:blue"), ("1 + N (s - 1)", "tab:orange")]
        ):
            axis.loglog(lengths, [value[k] for value in values], color=colour, label=label)
        axis.set(xlabel="tokens N", title=title, ylim=(1e-4, 1e6))
        axis.title.set_fontsize(9)
    axes[0].set_ylabel("variance of the weight")
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    _save(figure, path)


def drift_run(config: dict, steps: int = 400, rate: float = 0.5) -> dict[str, list[float]]:
    """Exact gradient ascent, on policy. An answer is right if its first token is 1, whatever its length."""
    sequences, _, _, _ = _policy(6)
    logits = torch.zeros(sequences.rows, 3, dtype=torch.float64)
    right = (sequences.tokens[:, 0] == 1).double()
    objective = _objective(config)
    out: dict[str, list[float]] = {"right": [], "wrong": [], "reward": []}
    for _ in range(steps):
        current = logprobs(logits, sequences)
        p = probabilities(current)
        reward = (p * right).sum()
        out["reward"].append(reward.item())
        for name, which in (("right", right), ("wrong", 1 - right)):
            out[name].append(((p * which * sequences.lengths).sum() / (p * which).sum()).item())
        c = coefficients(objective, current, current, current, right - reward, sequences.mask)
        gradient = expected_gradient(c, p, logits, sequences)
        logits = logits + rate * gradient
    return out


def drift(path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), sharex=True)
    for label, config, style in (
        ("with 1/N (GRPO, GSPO, SAPO)", {"preset": "grpo"}, "-"),
        ("without (Dr.GRPO, DAPO, Dr.GSPO)", {"preset": "dr_gspo"}, "--"),
    ):
        run = drift_run(config)
        left.plot(run["right"], style, color="tab:green", label=f"right answers, {label}")
        left.plot(run["wrong"], style, color="tab:red", label=f"wrong answers, {label}")
        right.plot(run["reward"], style, color="0.3", label=label)
    left.set(xlabel="step", ylabel="mean length, tokens", title="length is worth nothing in this task")
    right.set(xlabel="step", ylabel="share of right answers", title="reward")
    left.legend(fontsize=7, frameon=False, loc=(0.3, 0.1))
    right.legend(fontsize=8, frameon=False)
    _save(figure, path)


def weight_of_prompt(p: float, group: int) -> float:
    """c_G(p) = E_k sqrt(k (G - k)) / (G p (1 - p)), k ~ Bin(G, p)."""
    terms = (math.comb(group, k) * p**k * (1 - p) ** (group - k) * math.sqrt(k * (group - k)) for k in range(group + 1))
    return sum(terms) / (group * p * (1 - p))


def prompts(path: Path) -> None:
    figure, axis = plt.subplots(figsize=(5.6, 3.6))
    shares = torch.linspace(0.005, 0.995, 199, dtype=torch.float64).tolist()
    for group, colour in ((2, "0.6"), (4, "tab:green"), (8, "tab:blue"), (16, "tab:orange"), (64, "tab:red")):
        axis.plot(shares, [weight_of_prompt(p, group) for p in shares], color=colour, label=f"G = {group}")
    axis.plot(shares, [1 / math.sqrt(p * (1 - p)) for p in shares], color="black", linestyle=":", label="G infinite")
    axis.set(xlabel="share of right answers p of a prompt", ylabel="weight c_G(p) of its gradient", ylim=(0, 8))
    axis.legend(fontsize=8, frameon=False, ncol=2)
    _save(figure, path)


def slopes(path: Path) -> None:
    """c_t / A against r_t for one token alone."""
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.6), sharey=True)
    ratios = torch.linspace(0.02, 2.2, 1500, dtype=torch.float64)
    log_r = ratios.log()[:, None]
    zero, mask = torch.zeros_like(log_r), torch.ones_like(log_r, dtype=torch.bool)
    for axis, sign in zip(axes, (1.0, -1.0), strict=True):
        for label, config, style in (
            ("reinforce", {"preset": "reinforce"}, {"color": "0.85", "linewidth": 6}),
            ("clip 0.2, 0.28 (dapo)", {"preset": "dapo"}, {"color": "tab:blue", "linewidth": 2.5}),
            ("soft gate (sapo)", {"preset": "sapo"}, {"color": "tab:green"}),
            ("sg[clip], bound 1.5 (cispo)", {"preset": "cispo", "clip_high": 0.5}, {"color": "tab:red", "ls": "--"}),
        ):
            advantages = torch.full((len(ratios),), sign, dtype=torch.float64)
            c = coefficients(_objective(config), log_r, zero, zero, advantages, mask)[:, 0] / sign
            axis.plot(ratios.numpy(), c.numpy(), label=label, **style)
        axis.set(xlabel="r = pi/pi_o of the token", title="A > 0" if sign > 0 else "A < 0")
    axes[0].set_ylabel("c / A")
    axes[0].legend(fontsize=8, frameon=False)
    _save(figure, path)


def mean_below(log_s: float, k3: float, length: int) -> float:
    """P(mean of N log-ratios pi_o/mu < log_s) before any update.

    The log-ratios have mean -k3 and variance 2 k3 (small ratios): their mean is normal by the central limit theorem.
    """
    deviation = math.sqrt(2 * k3 / length)
    return 0.5 * (1 + math.erf((log_s + k3) / deviation / math.sqrt(2)))


def outside_clip(k3: float, length: int, low: float = 3e-4, high: float = 4e-4) -> float:
    """Share of sequences whose s leaves GSPO's clip before any update, when mu stands in for pi_o."""
    return mean_below(math.log1p(-low), k3, length) + 1 - mean_below(math.log1p(high), k3, length)


def dropped(kind: str, low: float | None, high: float, k3: float, length: int) -> float:
    """Share of responses that a correction drops before any update, of those that it judges (opsm: of the wrong)."""
    if kind == "opsm":
        return mean_below(-high, k3, length)
    power = length if kind == "sequence_mis" else 1  # W = s^N
    below = mean_below(math.log(low) / power, k3, length) if low else 0.0
    return below + 1 - mean_below(math.log(high) / power, k3, length)


DROPPED = (
    ("opsm", None, 1e-4),
    ("opsm", *CORRECTION_BOUNDS["opsm"]),
    ("geometric_mask", 0.999, 1.001),
    ("geometric_mask", *CORRECTION_BOUNDS["geometric_mask"]),
    ("sequence_mis", *CORRECTION_BOUNDS["sequence_mis"]),
)
"""Corrections of whole responses with bounds of others and with this project's defaults."""


def shares() -> None:
    """The table of docs/objectives.md of what corrections drop before any update."""
    lengths = (128, 512, 2048, 8192)
    print("share of responses dropped before any update, N =", ", ".join(map(str, lengths)))
    for kind, low, high in DROPPED:
        assert high is not None
        for k3 in (7.5e-4, 1.5e-3):
            row = ", ".join(f"{dropped(kind, low, high, k3, n):.1%}" for n in lengths)
            print(f"  {kind} {'' if low is None else f'{low:g} to '}{high:g}, k3 = {k3:g}: {row}")


def numbers() -> None:
    """The numbers in the text of docs/objectives.md."""
    print("weight of a prompt c_G(p):")
    for p in (0.01, 0.05, 0.25, 0.5):
        print(f"  p = {p:<5}", "  ".join(f"G = {g}: {weight_of_prompt(p, g):.2f}" for g in (2, 8, 16, 64)))
    k3 = sum(k3_of_distance(NEAR, 6, seed) for seed in SEEDS) / len(SEEDS)
    print(f"relative gradient bias at k3 = {k3:.2g}, at most 6 tokens:")
    for label, (config, _) in ESTIMATORS.items():
        print(f"  {mean_bias(config, NEAR, 6):.4f}  {label}")
    print("variance of the weight at 1,024 tokens (product, sum, geometric):")
    for title, pi in SKEWS.items():
        print("  " + ", ".join(f"{value:.3g}" for value in _token_moments(MU_TOKEN, pi, 1024)), "", title)
    print("length after 400 steps (start: right", end=" ")
    for preset in ("grpo", "dr_gspo"):
        run = drift_run({"preset": preset})
        if preset == "grpo":
            print(f"{run['right'][0]:.2f}, wrong {run['wrong'][0]:.2f}):")
        print(f"  {preset}: right {run['right'][-1]:.2f}, wrong {run['wrong'][-1]:.2f}, reward {run['reward'][-1]:.3f}")
    print("share of sequences outside GSPO's clip before any update, rollout log-probs as pi_o:")
    for k3 in (7.5e-4, 1.5e-3):
        print(f"  k3 = {k3:g}:", ", ".join(f"N = {n}: {outside_clip(k3, n):.0%}" for n in (512, 2048, 8192)))
    shares()


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
    print(f"{path}  {path.stat().st_size // 1024} KiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", action="store_true", help="print the numbers and draw nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "figures")
    options = parser.parse_args()
    if options.numbers:
        numbers()
        return
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    bias(out / "objectives_bias.png")
    variance(out / "objectives_variance.png")
    drift(out / "objectives_length.png")
    prompts(out / "objectives_prompts.png")
    slopes(out / "objectives_slopes.png")
    numbers()


if __name__ == "__main__":
    main()
