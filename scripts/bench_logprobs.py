"""Log-probs and entropies of a large vocabulary from hidden states: time, memory and errors.

    python scripts/bench_logprobs.py time   [--tokens 4096] [--hidden 2048] [--vocabulary 151936] [--rounds 2]
                                           [--clock cpu]
    python scripts/bench_logprobs.py memory [--tokens 4096] [--hidden 2048] [--vocabulary 151936]
    python scripts/bench_logprobs.py errors [--tokens 256]  [--hidden 2048]

(defaults without a GPU; with one 16,384 tokens, 20 rounds)

time:   forward and backward of `linear_logprobs` against the version that makes float32 logits, turn about in one
        process. `--clock cpu` counts CPU seconds, which other programs on the machine disturb less.
memory: peak above hidden states and weights, the gradients of these two counted apart. On a CPU each version runs in a
        process of its own and its resident set is read from the kernel; on a GPU the allocator is asked.
errors: mean and largest |log-prob error| against float64 of each head on sampled tokens, on the CPU.

Without a GPU the inputs are float32. With one they are bf16, accumulated in float32, and the Triton kernel and the
matmuls alone (bf16 out, nothing else done: the limit) are rows of their own; `--blocks 128,128,128,8,8,3` tries other
blocks of the kernel, in the order of `triton_kernels.Blocks`.

"kept tiles" leave their logits to backward whatever `sizes.KEPT` says, "torch tiles" never do.

All versions return the log-prob and the entropy; the gradient is of the log-prob.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.logprobs import sizes
from megatron_ext.logprobs.linear import linear_logprobs

GB = 1e9
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = "wall"


class Inputs(NamedTuple):
    """hidden [tokens, h] and weight [vocabulary, h] with gradient, labels and the log-probs' gradient [tokens]."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    of_logprob: Tensor


class Seconds(NamedTuple):
    """Of one forward and one backward; `entropy` is the part of forward that makes the entropy, where it is apart."""

    forward: float
    backward: float
    entropy: float = 0.0


def make_inputs(tokens: int, hidden: int, device: str, vocabulary: int) -> Inputs:
    """Random, in float32 on a CPU and in bf16 on a GPU; filled in place, so that the peak is not here."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x = torch.empty(tokens, hidden, dtype=dtype, device=device).normal_()
    w = torch.empty(vocabulary, hidden, dtype=dtype, device=device).normal_(std=2 / hidden**0.5)
    labels = torch.randint(vocabulary, (tokens,), device=device)
    return Inputs(x.requires_grad_(), w.requires_grad_(), labels, torch.randn(tokens, device=device))


def now(inputs: Inputs) -> float:
    if inputs.hidden.is_cuda:
        torch.cuda.synchronize()
    return CLOCKS[clock]()


def tiles(inputs: Inputs, kernel, *, kept: bool = False) -> Seconds:
    sizes.KEPT[inputs.hidden.device.type] = inputs.hidden.shape[0] * inputs.weight.shape[0] if kept else 0
    head = "fp32" if inputs.hidden.dtype == torch.float32 else "fp32_accumulate"
    start = now(inputs)
    logprobs, _ = linear_logprobs(
        inputs.hidden, inputs.weight, inputs.labels, vocab_size=len(inputs.weight), head=head, kernel=kernel
    )
    middle = now(inputs)
    torch.autograd.grad(logprobs, inputs[:2], inputs.of_logprob)
    return Seconds(middle - start, now(inputs) - middle)


def materialised(inputs: Inputs) -> Seconds:
    start = now(inputs)
    log_p = torch.log_softmax((inputs.hidden @ inputs.weight.t()).float(), -1)
    logprobs = log_p.gather(1, inputs.labels[:, None])[:, 0]
    before = now(inputs)
    with torch.no_grad():
        (log_p.exp() * log_p).sum(-1).neg_()
    middle = now(inputs)
    del log_p
    torch.autograd.grad(logprobs, inputs[:2], inputs.of_logprob)
    return Seconds(middle - start, now(inputs) - middle, middle - before)


def matmuls(inputs: Inputs) -> Seconds:
    with torch.no_grad():
        start = now(inputs)
        logits = inputs.hidden @ inputs.weight.t()
        middle = now(inputs)
        logits @ inputs.weight, logits.t() @ inputs.hidden
        return Seconds(middle - start, now(inputs) - middle)


CPU: dict[str, Callable[[Inputs], Seconds]] = {
    "float32 logits": materialised,
    "torch tiles": partial(tiles, kernel="torch"),
    "kept tiles": partial(tiles, kernel="torch", kept=True),
}
CUDA: dict[str, Callable[[Inputs], Seconds]] = {
    **CPU,
    "Triton tiles": partial(tiles, kernel="triton"),
    "matmuls alone": matmuls,
}


def run_time(args: argparse.Namespace) -> None:
    """Warm up small on a CPU, where a round takes minutes, and with a whole round on a GPU."""
    versions = CPU if args.device == "cpu" else CUDA
    inputs = make_inputs(args.tokens, args.hidden, args.device, args.vocabulary)
    few = Inputs(inputs.hidden[:64], inputs.weight, inputs.labels[:64], inputs.of_logprob[:64])
    for version in versions.values():
        version(few if args.device == "cpu" else inputs)
    taken: dict[str, list[Seconds]] = {name: [] for name in versions}
    for _ in range(args.rounds):
        for name, version in versions.items():
            taken[name].append(version(inputs))
            if args.device == "cpu":
                print(f"{name:>16}: forward {taken[name][-1].forward:.2f} s, backward {taken[name][-1].backward:.2f} s")
    flop = 2 * args.tokens * args.vocabulary * args.hidden
    print(f"\n{'median of the rounds':>20}{'forward s':>12}{'TFLOP/s':>9}{'backward s':>12}{'TFLOP/s':>9}")
    for name, rounds in taken.items():  # TFLOP/s of the one and two matmuls that are unavoidable
        forward, backward, _ = (statistics.median(x) for x in zip(*rounds, strict=True))
        print(f"{name:>20}{forward:12.4f}{flop / forward / 1e12:9.3f}{backward:12.4f}{2 * flop / backward / 1e12:9.3f}")
    for name in versions:
        for base in ("float32 logits", "torch tiles", "matmuls alone"):
            if name != base and base in versions:
                print(ratios(name, base, taken))


def ratios(name: str, base: str, taken: dict[str, list[Seconds]]) -> str:
    """Medians over the rounds of this version's seconds over that one's in the same round."""
    pairs = list(zip(taken[name], taken[base], strict=True))
    forward = statistics.median(a.forward / b.forward for a, b in pairs)
    backward = statistics.median(a.backward / b.backward for a, b in pairs)
    both = statistics.median((a.forward + a.backward) / (b.forward + b.backward) for a, b in pairs)
    strict = statistics.median((a.forward + a.backward) / (b.forward - b.entropy + b.backward) for a, b in pairs)
    return (
        f"{name} / {base}: forward {forward:.2f}, backward {backward:.2f}, both {both:.2f}"
        + (f"; {strict:.2f} if {base} made no entropy" if base == "float32 logits" else "")
    )  # fmt: skip


def resident(field: str) -> int:
    """Bytes of this process that are resident now (VmRSS), or were at most (VmHWM)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def peak_on_cpu(name: str, tokens: int, hidden: int, vocabulary: int, answers) -> None:
    inputs = make_inputs(tokens, hidden, "cpu", vocabulary)
    before = resident("VmRSS")
    CPU[name](inputs)
    answers.put(resident("VmHWM") - before)


def run_memory(args: argparse.Namespace) -> None:
    size = 4 if args.device == "cpu" else 2
    gradients = size * args.hidden * (args.tokens + args.vocabulary)
    logits = 4 * args.tokens * args.vocabulary
    print(f"one [tokens, vocabulary] float32 is {logits / GB:.2f} GB, the two gradients are {gradients / GB:.2f} GB")
    for name in CPU if args.device == "cpu" else [n for n in CUDA if n != "matmuls alone"]:
        if args.device == "cpu":
            context = multiprocessing.get_context("spawn")
            answers = context.Queue()
            process = context.Process(
                target=peak_on_cpu, args=(name, args.tokens, args.hidden, args.vocabulary, answers)
            )
            process.start()
            peak = answers.get()
            process.join()
        else:
            inputs = make_inputs(args.tokens, args.hidden, args.device, args.vocabulary)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            CUDA[name](inputs)
            peak = torch.cuda.max_memory_allocated() - before
        print(f"{name:>16}: peak {peak / GB:.2f} GB above the inputs, {(peak - gradients) / GB:.2f} GB less gradients")


def run_errors(args: argparse.Namespace) -> None:
    """Logits of deviation 2, with one token about as likely as all others together; labels sampled from them."""
    generator = torch.Generator().manual_seed(0)
    w = torch.empty(args.vocabulary, args.hidden).normal_(std=2 / args.hidden**0.5, generator=generator)
    favourite = w[torch.randint(args.vocabulary, (args.tokens,), generator=generator)]
    logit = 14 + 2 * torch.randn(args.tokens, 1, generator=generator)
    x = torch.randn(args.tokens, args.hidden, generator=generator)
    x += logit * favourite / favourite.square().sum(1, keepdim=True)
    labels = torch.multinomial((x @ w.t()).softmax(1), 1, generator=generator)[:, 0]
    print(f"vocabulary {args.vocabulary}, hidden {args.hidden}, {args.tokens} sampled tokens")
    for inputs, (a, b) in {"bf16": (x.bfloat16(), w.bfloat16()), "float32": (x, w)}.items():
        logits = torch.cat([a.double() @ part.double().t() for part in b.split(8192)], 1)
        expected = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
        for head in ("bf16", "fp32_accumulate", "fp32"):
            value, _ = linear_logprobs(a, b, labels, vocab_size=args.vocabulary, head=head)
            error = (value - expected).abs()
            print(f"{inputs:>8} inputs, {head:>15} head: mean {error.mean():.1e}, largest {error.max():.1e} nats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "memory", "errors"])
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: seconds of this process, all threads")
    parser.add_argument("--blocks", help="of the Triton kernel")
    args = parser.parse_args()
    global clock
    clock = args.clock
    if args.blocks:
        from megatron_ext.logprobs import triton_kernels

        blocks = triton_kernels.Blocks(*(int(x) for x in args.blocks.split(",")))
        triton_kernels.LARGE = triton_kernels.MIDDLE = blocks
    gpu = args.device != "cpu"
    args.tokens = args.tokens or (256 if args.what == "errors" else 16_384 if gpu else 4096)
    args.rounds = args.rounds or (20 if gpu else 2)
    {"time": run_time, "memory": run_memory, "errors": run_errors}[args.what](args)


if __name__ == "__main__":
    main()
