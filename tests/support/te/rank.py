"""A trainer rank as it is on a GPU with Transformer Engine, its kernels in torch and gloo between the ranks.

    python -m tests.support.te.rank JOBS RANK OUT

JOBS: a pickle of [(layout, [(name, model directory, samples, routes)])]. OUT: one of {(number of the layout, name):
`tests.support.te.step.part` of this rank}. All ranks are started at once and meet beside JOBS.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from tests.support.te.process import as_on_a_gpu


def main() -> None:
    """The command."""
    as_on_a_gpu()
    import torch

    from megatron_ext import parallel
    from tests.support.te.step import part

    torch.set_num_threads(1)
    jobs, rank, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    parts = {}
    for number, (layout, models) in enumerate(pickle.loads(jobs.read_bytes())):
        parallel.initialize(layout, rank=rank, init_method=f"file://{jobs}.{number}", timeout_s=120)
        for name, model, samples, routes in models:
            parts[number, name] = part(layout, model, samples, routes)
        parallel.shutdown()
    out.write_bytes(pickle.dumps(parts))


if __name__ == "__main__":
    main()
