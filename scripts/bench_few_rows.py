"""Experts of a decoding step: products of few rows as the server computes them on a CPU, and as torch does.

    .venv/bin/python scripts/bench_few_rows.py [--rows 4 8 16 24 32 40 48]
    .venv/bin/python scripts/bench_few_rows.py --layers 4 --experts 8 --hidden 64 --inner 64 --rows 1 4 16 48 96 192

Layers of as many and as large experts as SmolLM2-MoE has, one after the other, so that no weight lies in a cache when
it is read; or of others, such as the tiny model's, which do. GB/s are those of weights; what reading memory allows is
measured beside.
"""

from __future__ import annotations

import argparse
import itertools
import os

import numpy as np
import torch
from bench_language import seconds

from pipeline.engine.inside.cpu import few_rows


def of_library(x: torch.Tensor, rows: np.ndarray, gate_up: torch.Tensor, down: torch.Tensor, starts: list[int]) -> None:
    """What `few_rows.experts` computes."""
    inputs, output = x[torch.from_numpy(rows)], x.new_empty(len(rows), x.shape[1])
    for expert, (start, end) in enumerate(itertools.pairwise(starts)):
        gate, up = torch.mm(inputs[start:end], gate_up[expert].t()).chunk(2, dim=1)
        torch.mm(torch.nn.functional.silu(gate) * up, down[expert].t(), out=output[start:end])


def measured(count: int, gate_up: torch.Tensor, down: torch.Tensor, repeat: int) -> tuple[float, float]:
    """Seconds of all layers, ours and the library's, with so many rows for each expert."""
    experts, hidden = down.shape[1:3]
    starts = np.arange(experts + 1) * count
    rows = np.random.default_rng(0).integers(0, 2 * count, experts * count)
    x, layers = torch.randn(2 * count, hidden), list(zip(gate_up, down, strict=True))
    most = few_rows.most_rows(*layers[0])
    ours = seconds(lambda: [few_rows.experts(x, rows, *layer, starts, most) for layer in layers], repeat)
    return ours, seconds(lambda: [of_library(x, rows, *layer, starts.tolist()) for layer in layers], repeat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 16, 24, 32, 40, 48], help="of each expert")
    for name, size in (("layers", 30), ("experts", 4), ("hidden", 576), ("inner", 1536)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--repeat", type=int, default=9, help="times, of which the fastest counts")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    layers, experts, hidden, inner = options.layers, options.experts, options.hidden, options.inner
    gate_up = torch.randn(layers, experts, 2 * inner, hidden) / hidden**0.5
    down = torch.randn(layers, experts, hidden, inner) / inner**0.5
    if max(options.rows) > (most := few_rows.most_rows(gate_up[0], down[0])):
        parser.error(f"--rows {max(options.rows)}: an expert of that size has at most {most}, more are the library's")
    size = gate_up.nbytes + down.nbytes
    print(f"{torch.get_num_threads()} threads; {gate_up.nbytes / seconds(gate_up.sum, 5) / 1e9:.1f} GB/s are read")
    print("rows   ours ms   GB/s   torch ms   GB/s   torch / ours")
    for count in options.rows:
        ours, other = measured(count, gate_up, down, options.repeat)
        rates = size / ours / 1e9, size / other / 1e9
        print(f"{count:4}{ours * 1e3:10.2f}{rates[0]:7.1f}{other * 1e3:11.2f}{rates[1]:7.1f}{other / ours:15.2f}")


if __name__ == "__main__":
    main()
