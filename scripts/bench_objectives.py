"""Loss plus backward of every preset against the plainest torch version of the same equation.

    python scripts/bench_objectives.py [--device cuda] [--sequences 64] [--tokens 4096]

Both run in one process, turn about, on the same tensors. The table gives median milliseconds, the median over the turns
of their ratio, and the most memory that a call holds beyond its inputs (on a CPU from the profiler's allocation events,
on a GPU from the allocator). The plain versions compute no metrics and check nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.objectives import PRESETS, Denominators, LossInputs, ObjectiveConfig, resolve
from tests.support.plain import PLAIN

Loss = Callable[[LossInputs, Denominators], Tensor]


def inputs_for(name: str, sequences: int, tokens: int, device: str) -> tuple[LossInputs, Denominators]:
    """A batch of the mismatch and staleness of a real run: log-ratios of about 0.02 and 0.1."""
    generator = torch.Generator().manual_seed(0)

    def noise(scale: float) -> Tensor:
        return (scale * torch.randn(sequences, tokens, generator=generator)).to(device)

    lengths = torch.randint(tokens // 4, tokens + 1, (sequences, 1), generator=generator)
    mask = (torch.arange(tokens) < lengths).to(device)
    rollout = -torch.rand(sequences, tokens, generator=generator).to(device)
    proximal = rollout + noise(0.02)
    per_token = name in ("ppo", "reinforce_plus_plus")
    values = noise(1.0)
    inputs = LossInputs(
        current_logprobs=(proximal + noise(0.1)).requires_grad_(),
        proximal_logprobs=proximal,
        rollout_logprobs=rollout,
        advantages=noise(1.0) if per_token else noise(1.0)[:, 0].contiguous(),
        mask=mask,
        values=(values + noise(0.1)).requires_grad_() if name == "ppo" else None,
        proximal_values=values if name == "ppo" else None,
        returns=noise(1.0) if name == "ppo" else None,
    )
    return inputs, Denominators.of(mask, tokens)


def step(loss: Loss, inputs: LossInputs, denominators: Denominators) -> float:
    """One loss and its gradient."""
    leaves = [x for x in (inputs.current_logprobs, inputs.values) if x is not None]
    value = loss(inputs, denominators)
    torch.autograd.grad(value, leaves)
    return float(value.detach())


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most bytes a call holds at once beyond what was there before it."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    live = peak = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--only", nargs="*", default=list(PRESETS))
    args = parser.parse_args()
    print(
        f"{args.sequences} sequences x {args.tokens} tokens, float32, {args.device}, {torch.get_num_threads()} threads"
    )
    print(f"{'preset':22}{'ms':>8}{'plain ms':>10}{'ratio':>7}{'MiB':>8}{'plain MiB':>11}{'ratio':>7}")
    for name in args.only:
        compare(name, args)


def compare(name: str, args: argparse.Namespace) -> None:
    """One row of the table."""
    objective = resolve(ObjectiveConfig(preset=name))
    inputs, denominators = inputs_for(name, args.sequences, args.tokens, args.device)
    losses: tuple[Loss, Loss] = (lambda x, d, o=objective: o.loss(x, d).loss, PLAIN[name])
    values = [step(loss, inputs, denominators) for loss in losses]
    if abs(values[0] - values[1]) > 1e-4 * max(1e-3, abs(values[1])):
        raise SystemExit(f"{name}: {values[0]} against the plain {values[1]}: not the same equation")
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(args.repeats + 5):
        for loss, taken in zip(losses, seconds, strict=True):
            start = time.perf_counter()
            step(loss, inputs, denominators)
            if args.device != "cpu":
                torch.cuda.synchronize()
            if repeat >= 5:
                taken.append(time.perf_counter() - start)
    ours, plain = (1e3 * statistics.median(taken) for taken in seconds)
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    held = [peak_bytes(lambda loss=loss: step(loss, inputs, denominators), args.device) / 2**20 for loss in losses]
    print(f"{name:22}{ours:8.2f}{plain:10.2f}{ratio:7.2f}{held[0]:8.1f}{held[1]:11.1f}{held[0] / held[1]:7.2f}")


if __name__ == "__main__":
    main()
