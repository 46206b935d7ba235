"""A diagnosis: how large the gap is, what it is made of, and the sentence that says so.

gap of the run's own setting
  -> every part exchanged alone: how much of the gap goes with it
  -> the part that closes it most stays exchanged, and again, until no part halves what is left
  -> what is left is attention and the rest
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.replay import Replay
from pipeline.diagnose.bench import Bench, Engines, Setting
from pipeline.diagnose.breakdown import Calibration, WorstToken, by_lag, by_position, calibration, worst_tokens
from pipeline.diagnose.exchanges import PARTS, WHOLESALE, NotMeasured, Trial, try_part
from pipeline.diagnose.verdict import verdict
from pipeline.observe.long_phase import LongPhases
from pipeline.observe.metrics import mismatch_of
from pipeline.step import PolicyTokens
from pipeline.trainer.waits import TrainerError
from pipeline.types import Rollout

ROUNDS = 3  # parts that are exchanged together, at most
NAMED = 0.7  # a part is named where it leaves at most this share of the gap
NOISE = 0.01  # of the bound: what is smaller is rounding


@dataclass(frozen=True)
class Diagnosis:
    """What was measured.

    agree:        the mean gap is within the bound, no tensor differs, and the server samples what its log-probs say.
    sentence:     the largest part and what to change, or that the engines agree.
    bound:        largest mean |log pi_o - log mu|, nats.
    gap:          mismatch_metrics of the run's own setting, keys without "mismatch/".
    parts:        every part exchanged alone; empty where the gap was within the bound and nothing more was asked for.
    not_measured: part -> why.
    findings:     the parts that were exchanged together, in the order in which they were found.
    rest:         mean gap with all of them exchanged, nats.
    weights:      names of the tensors that the server holds otherwise, and how; None: not compared.
    calibration:  see Calibration; None for fewer than two tokens.
    by_position, by_lag: see breakdown.
    by_layer:     share of replayed experts that the trainer would have chosen itself, nan for a dense layer; empty
                  without routes.
    worst:        the tokens that differ most.
    """

    agree: bool
    sentence: str
    bound: float
    gap: dict[str, float]
    rollouts: int
    tokens: int
    weight_version: int
    routes: str
    parts: tuple[Trial, ...] = ()
    not_measured: dict[str, str] = field(default_factory=dict)
    findings: tuple[Trial, ...] = ()
    rest: float = 0.0
    weights: tuple[str, ...] | None = None
    calibration: Calibration | None = None
    by_position: tuple[dict[str, float], ...] = ()
    by_layer: tuple[float, ...] = ()
    by_lag: tuple[dict[str, float], ...] = ()
    worst: tuple[WorstToken, ...] = ()
    written: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))

    def write_json(self, path: Path) -> None:
        """Write it; the file appears whole or not at all. A number that is not finite becomes null."""
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(_plain(dataclasses.asdict(self)), indent=1, allow_nan=False) + "\n")
        os.replace(partial, path)


def diagnose(
    loop: Engines,
    model_path: Path,
    rollouts: Sequence[Rollout],
    *,
    replay: Replay | None = None,
    in_full: bool = True,
    phases: LongPhases | None = None,
) -> Diagnosis:
    """Measure.

    rollouts: sampled, or read from a dump; those without a response are left out.
    replay:   of the run, where the loop's own is another so that routes come with the rollouts.
    in_full:  exchange every part, whatever the gap is; else only where it is beyond the bound.
    phases:   tell how far it is; None: nobody is told.
    Leaves the server with the trainer's weights sent anew where parts were exchanged. Raises ValueError for no rollout,
    and what the engines raise.
    """
    rollouts = [r for r in rollouts if len(r)]
    if not rollouts:
        raise ValueError("there is no rollout with a response to compare the engines on")
    bench, phases = Bench(loop, rollouts), phases or LongPhases()
    base = Setting(routes="rollout" if (replay or loop.replay).from_server and bench.has_routes else "native")
    with phases.of("the log-probs of both engines are compared"):
        policy = bench.trainer(base)
    gap = {name.removeprefix("mismatch/"): value for name, value in mismatch_of(rollouts, policy).items()}
    bound, tokens = loop.config.logprob_bound, sum(len(r) for r in rollouts)
    version = loop.fleet.version  # weights that are sent again are the same under the next number
    measured: dict[str, Any] = {}
    if tokens > 1:
        measured["calibration"] = calibration(policy, loop.shape.vocab_size)
    beyond = not gap["abs_logprob"] <= bound
    if in_full or beyond:
        with phases.of("the gap between the engines is taken apart", bench.far):
            measured |= _in_full(loop, bench, base, policy, NOISE * bound)
    found = Diagnosis(
        agree=not beyond and not measured.get("weights") and not (tokens > 1 and measured["calibration"].off),
        sentence="",
        bound=bound,
        gap=gap,
        rollouts=len(rollouts),
        tokens=tokens,
        weight_version=version,
        routes=base.routes,
        rest=gap["abs_logprob"],
    )
    found = dataclasses.replace(found, **measured)
    return dataclasses.replace(found, sentence=verdict(found, loop.config))


def _in_full(loop: Engines, bench: Bench, base: Setting, policy: PolicyTokens, noise: float) -> dict[str, Any]:
    """The fields of a Diagnosis that say what the gap is made of, and where it lies."""
    layers, version, uncompared = bench.agreement(), loop.fleet.version, dict[str, str]()
    measured: dict[str, Any] = {
        "by_position": tuple(by_position(bench.rollouts, policy)),
        "by_layer": tuple(layers) if layers is not None else (),
        "by_lag": tuple(by_lag(bench.rollouts, policy, version)),
        "worst": tuple(worst_tokens(loop, bench.rollouts, policy)),
    }
    if loop.fleet.serves:
        try:
            measured["weights"] = tuple(f"{d.name} ({d.kind})" for d in loop.trainers.weight_differences())
        except TrainerError as error:  # quantized weights cannot be read back
            uncompared["weights by name"] = str(error)
    measured |= _take_apart(bench, base, noise)
    measured["not_measured"] |= uncompared
    return measured


def _take_apart(bench: Bench, base: Setting, noise: float) -> dict[str, Any]:
    """parts, not_measured, findings and rest of a Diagnosis."""
    trials, absent = _trials(bench, base, PARTS)
    # The server's second pass goes round most of what can be wrong, so it explains only what nothing else does.
    findings = _explain(bench, base, [p for p in PARTS if p not in WHOLESALE], noise)
    least = min((t.abs_logprob for t in trials if t.part in WHOLESALE), default=np.inf)
    if not findings or findings[-1].abs_logprob > max(2 * least, noise):
        findings = _explain(bench, base, list(PARTS), noise)
    left = findings[-1].abs_logprob if findings else bench.gap(base).abs_logprob
    return {"parts": tuple(trials), "not_measured": absent, "findings": tuple(findings), "rest": left}


def _explain(bench: Bench, base: Setting, parts: Sequence[str], noise: float) -> list[Trial]:
    """The parts that close the gap, each exchanged together with those before it."""
    current, left, findings = base, bench.gap(base).abs_logprob, []
    while left > noise and len(findings) < ROUNDS:
        found = {f.part for f in findings}
        trials, _ = _trials(bench, current, [p for p in parts if p not in found])
        least = min((t.abs_logprob for t in trials), default=np.inf)
        if not least <= NAMED * left:
            break
        chosen = next(t for t in trials if t.abs_logprob <= max(2 * least, min(noise, NAMED * left)))
        findings.append(chosen)
        current, left = chosen.setting, chosen.abs_logprob
    return findings


def _trials(bench: Bench, setting: Setting, parts: Iterable[str]) -> tuple[list[Trial], dict[str, str]]:
    """Each part exchanged alone, and why some cannot be."""
    trials, absent = [], {}
    for part in parts:
        try:
            trials.append(try_part(part, bench, setting))
        except NotMeasured as why:
            absent[part] = str(why)
    return trials, absent


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
