"""Run the Triton kernels in Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.support.interpret_triton OUT

A process of its own, because Triton reads the variable when a kernel is defined.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch

from megatron_ext.config import Head
from megatron_ext.logprobs import linear, triton_kernels
from megatron_ext.logprobs.linear import linear_logprobs
from tests.support.logprob_cases import VOCAB, case, differentiate


class Run(NamedTuple):
    """A call of `linear_logprobs`, and whether the loss uses the entropy."""

    head: Head
    temperature: float = 1.0
    kept: bool = False
    entropy: bool = True


RUNS = {
    "fp32": Run("fp32"),
    "fp32, log-probs alone": Run("fp32", entropy=False),
    "fp32, kept set and temperature": Run("fp32", 0.7, kept=True),
    "fp32_accumulate": Run("fp32_accumulate", 0.7),
    "bf16": Run("bf16", 0.7, kept=True),
}


def main() -> None:
    # Three blocks of tokens in groups of two, several of columns and depth, two tiles; none divides its whole.
    triton_kernels.SMALL = triton_kernels.Blocks(tokens=16, columns=64, depth_bytes=64, group=2, warps=4, stages=1)
    linear.TILE["cpu"] = 2**10
    c, answers = case(), {}
    for name, run in RUNS.items():
        hidden, weight = c.hidden.clone().requires_grad_(), c.weight.clone().requires_grad_()
        results = linear_logprobs(
            hidden, weight, c.labels, vocab_size=VOCAB, head=run.head, temperature=run.temperature,
            kept=c.kept if run.kept else None, kernel="triton",
        )  # fmt: skip
        of_entropy = c.of_entropy if run.entropy else None
        answers[name] = tuple(differentiate(*results, hidden, weight, c.of_logprob, of_entropy))
    torch.save(answers, sys.argv[1])


if __name__ == "__main__":
    main()
