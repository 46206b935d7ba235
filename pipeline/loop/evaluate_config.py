"""`sameroute evaluate`: the sets of a configuration on one model, by servers alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from megatron_ext.hf.description import read_description
from pipeline.checkpoints.weights_of import weights_of
from pipeline.config import Config
from pipeline.config.load_config import check_precision, check_served
from pipeline.environments.loading import open_environments
from pipeline.evaluation.opened_set import open_sets
from pipeline.evaluation.page import write_page
from pipeline.evaluation.result import Evaluation
from pipeline.loop.engines import start_servers
from pipeline.loop.evaluations import evaluate_set
from pipeline.loop.inputs import check_evaluation, config_device, prepare_model
from pipeline.say import to_stderr


def evaluate_config(
    config: Config, out: Path, model: Path | None = None, *, say: Callable[[str], None] = to_stderr
) -> list[Evaluation]:
    """Every set of the configuration; writes NAME.jsonl (the answers), evaluation.json, evaluation.html and logs/ into
    `out`, which takes the place of an earlier one's. Nothing is left running.

    model: a Hugging Face directory or a checkpoint of a run; None: the model of the configuration.
    say: hears how far it is. Raises ConfigError, NoModelError, DataError,
    RewardError and ServerError.
    """
    check_precision(config, config_device(config))
    check_served(config, config_device(config))
    check_evaluation(config)
    with weights_of(prepare_model(config, out / "model") if model is None else model) as directory:
        sets = open_sets(config, directory, say)
        logs = out / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        found = []
        with start_servers(config, directory, read_description(directory), logs) as fleet:
            for asked in sets:
                with open_environments(config.environment, asked.tokenizer, asked.sampling.stop_token_ids) as attempts:
                    found.append(evaluate_set(asked, fleet, config, step=0, say=say, attempts=attempts))
                _write(out / f"{asked.name}.jsonl", "".join(json.dumps(a) + "\n" for a in found[-1].answers))
    rows = [{key: value for key, value in one.row().items() if key not in ("step", "version")} for one in found]
    what = str(model or config.model.path or "tiny model")
    _write(out / "evaluation.json", json.dumps({"model": what, "sets": rows}, indent=1) + "\n")
    write_page(found, out / "evaluation.html", name=what)
    return found


def _write(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)
