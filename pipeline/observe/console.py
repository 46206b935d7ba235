"""What a person watching sees: a progress bar where there is a terminal, and one line a step anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipeline.text.characters import visible

_SUPERVISED_LINES = 10  # plain lines over all supervised steps

# Label, key, format. A key that a run does not have (routes of a dense model) is left out of its lines.
_COLUMNS = (
    ("reward", "reward/mean", "{:.3f}"),
    ("mismatch k3", "mismatch/k3", "{:.1e}"),
    ("clipped", "loss/clip_fraction", "{:.1%}"),
    ("replayed", "routing/replayed_fraction", "{:.1%}"),
    ("length", "response/length_mean", "{:.1f}"),
    ("lag", "rollout/lag_mean", "{:.1f}"),
    ("idle trainer", "idle/trainer", "{:.0%}"),
    ("idle servers", "idle/servers", "{:.0%}"),
    ("rollout", "throughput/rollout_tokens_per_s", "{:,.0f} tok/s"),
    ("train", "throughput/train_tokens_per_s", "{:,.0f} tok/s"),
)
_PHASES = ("rollout", "reward", "wait", "train", "pause", "sync", "step")


def step_line(metrics: Mapping[str, float], steps: int) -> str:
    """One step in one line: what was learnt, how far the engines differ, tokens/s of both, seconds by phase."""
    width = len(str(steps))
    shown = [f"{label} {form.format(metrics[key])}" for label, key, form in _COLUMNS if key in metrics]
    seconds = [f"{p} {metrics[f'time/{p}_s']:.2f}" for p in _PHASES if f"time/{p}_s" in metrics]
    if seconds:
        shown.append(f"seconds: {', '.join(seconds)}")
    return f"step {int(metrics['step']):>{width}}/{steps}  " + "  ".join(shown)


class Console:
    """A context. Lines go to `file` (null: standard output); the bar stands below them on a terminal only."""

    def __init__(self, steps: int, file: TextIO | None = None):
        """steps: RL steps of the run."""
        self.steps = steps
        self._rich = RichConsole(file=file, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._rich,
            disable=not self._rich.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Console:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """One line. What would act on the terminal, or what its encoding does not have, is shown as an escape."""
        known = visible(line).encode(self._rich.encoding, "backslashreplace").decode(self._rich.encoding)
        self._rich.print(known, markup=False, emoji=False)

    def supervised(self, number: int, steps: int, nll: float) -> None:
        """Supervised step `number` of `steps` is done. nll: mean negative log-likelihood, nats a token."""
        self._advance("supervised", number, steps)
        if number in (1, steps) or number % max(1, steps // _SUPERVISED_LINES) == 0:
            self.say(f"supervised {number:>{len(str(steps))}}/{steps}  loss {nll:.3f} nats/token")

    def step(self, metrics: Mapping[str, float]) -> None:
        """An RL step is done; metrics as in metrics.jsonl."""
        self._advance("reinforcement", int(metrics["step"]), self.steps)
        self.say(step_line(metrics, self.steps))

    def _advance(self, phase: str, number: int, total: int) -> None:
        if phase not in self._tasks:
            for other in self._tasks.values():
                self._bar.remove_task(other)
            self._tasks = {phase: self._bar.add_task(phase, total=total)}
        self._bar.update(self._tasks[phase], completed=number)
