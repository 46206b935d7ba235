"""`sameroute diagnose`: both engines up as a run would have them at its first step, and the diagnosis of their gap."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import Config
from pipeline.config.replay import Replay
from pipeline.diagnose.bench import new_rollouts
from pipeline.diagnose.diagnosis import Diagnosis, diagnose
from pipeline.diagnose.page import write_page
from pipeline.dumps.steps import DumpedSteps
from pipeline.loop.run import check_inputs, open_loop
from pipeline.observe.console import Console


def run(config: Config, out: Path, dump: Path | None = None) -> Diagnosis:
    """Diagnose a configuration; writes diagnose.json, diagnose.html and logs/ into `out`. Nothing is left running.

    dump: a step that a run with debug.dump_rollouts wrote, or a directory of them, of which the first counts; its
          rollouts in the place of new ones. They should be of the weights that the configuration begins with.
    Raises what `session.train` raises.
    """
    dumped = None if dump is None else DumpedSteps(dump)
    check_inputs(config)
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with Console(0) as console:
        with open_loop(
            with_routes(config),
            out,
            logs,
            on_supervised=lambda number, nll, *_: console.supervised(number, config.supervised.steps, nll),
        ) as (loop, model_path):
            if dumped is None:
                rollouts = new_rollouts(loop, config.checks.probe_rollouts)
            else:
                step = dumped.read(dumped.steps[0], config, loop.shape)
                rollouts = step.batch.rollouts
            found = diagnose(loop, model_path, rollouts, replay=config.replay)
        found.write_json(out / "diagnose.json")
        write_page(found, out / "diagnose.html", name=str(config.run.directory))
        console.say(found.sentence)
        console.say(f"{out / 'diagnose.html'}, {out / 'diagnose.json'}")
    return found


def with_routes(config: Config) -> Config:
    """The same with routes beside the rollouts, where the trainer can take them; else as it is."""
    try:
        config.trainer.check_replay()
    except ValueError:
        return config
    return config.model_copy(update={"replay": Replay.R3})
