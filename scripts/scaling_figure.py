"""Steps a second and idle GPUs from 8 to 16,384 GPUs, for docs/scaling.md: a figure and a table.

.venv/bin/python scripts/scaling_figure.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, PercentFormatter

from pipeline.config import load_config_and_model
from pipeline.plan.plan import make_plan
from pipeline.plan.simulate import MODES, Workload, scaling

SIZES = [8 * 2**i for i in range(12)]
COLOURS = {"synchronous": "#c44e52", "one step off": "#dd8452", "asynchronous": "#4c72b0"}
STRONG, WEAK = 8192, 256


def main() -> None:
    apart = ["cluster.colocated=false", "parallel.ranks=4", "parallel.expert=4"]
    config, model = load_config_and_model("configs/qwen3-30b-a3b/1-node.yaml", apart)
    plan = make_plan(config, model, "h100")
    one = Workload(
        model,
        plan.gpu,
        plan.server,
        plan.lengths,
        prompt=config.data.max_prompt_tokens / 2,
        samples=STRONG,
        quantum=config.parallel.ranks,
        mini_batches=config.train.mini_batches,
    )
    columns = {
        f"{STRONG:,} answers a step": scaling(one, SIZES, weak=False),
        f"{WEAK // SIZES[0]} answers a step and GPU": scaling(replace(one, samples=WEAK), SIZES, weak=True),
    }
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, layout="constrained")
    for column, (title, found) in enumerate(columns.items()):
        print(f"\n{title}\n")
        print("| GPUs | " + " | ".join(f"{m}: steps/h, idle, trainer GPUs" for m in MODES) + " |")
        print("|---|" + "---|" * len(MODES))
        for gpus, modes in found.items():
            cells = (f"{3600 * o.steps_s:,.1f}, {o.idle:.0%}, {o.trainer_gpus:,}" for o in modes.values())
            print(f"| {gpus:,} | " + " | ".join(cells) + " |")
        top, bottom = axes[0, column], axes[1, column]
        for mode in MODES:
            style = {"color": COLOURS[mode], "label": mode, "marker": "o", "markersize": 4}
            top.plot(SIZES, [3600 * found[n][mode].steps_s for n in SIZES], **style)
            bottom.plot(SIZES, [found[n][mode].idle for n in SIZES], **style)
        top.set_title(title)
        top.set_ylabel("steps an hour" if column == 0 else "")
        bottom.set_ylabel("idle share of all GPUs" if column == 0 else "")
        bottom.set_xlabel("GPUs (H100)")
        bottom.set_ylim(0, 1)
        bottom.yaxis.set_major_formatter(PercentFormatter(1.0))
        top.set_xscale("log", base=2)
        if column == 0:
            top.set_yscale("log")
        else:
            top.set_ylim(bottom=0)
        top.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        bottom.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{int(value):,}"))
        bottom.set_xticks(SIZES[::2])
        bottom.tick_params(axis="x", labelrotation=45)
        for axis in (top, bottom):
            axis.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False)
    path = Path("docs/figures/scaling.png")
    figure.savefig(path, dpi=150)
    print(f"\n{path}")


if __name__ == "__main__":
    main()
