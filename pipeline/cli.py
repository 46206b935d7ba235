"""The command `sameroute`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import warnings
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the run failed, 2 the command or its configuration is wrong, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="sameroute", description="Reinforcement learning for mixture-of-experts language models."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="run a configuration: supervised steps, then reinforcement learning")
    train.add_argument("config", type=Path, help="YAML file")
    train.add_argument("overrides", nargs="*", metavar="section.field=value", help="overrides of single fields")
    objectives = commands.add_parser("objectives", help="the table of objectives, or one with its equation")
    objectives.add_argument("name", nargs="?", help="a preset of the table")
    _add_convert(commands)
    options = parser.parse_args(arguments)
    return {"train": _train, "objectives": _objectives, "convert": _convert}[options.command](options)


def _train(options: argparse.Namespace) -> int:
    from pipeline.config import ConfigError, load_config

    try:
        config = load_config(options.config, options.overrides)
    except ConfigError as error:
        return _fail(str(error), 2)

    from pipeline.controller import DisagreementError, NothingToLearnError
    from pipeline.data.prompts import DataError
    from pipeline.observe.run_dir import RunDirectoryError
    from pipeline.rewards import RewardError
    from pipeline.rollout.server import ServerError
    from pipeline.session import train
    from pipeline.weights import WeightTransferError
    from pipeline.workers import TrainerError

    signal.signal(signal.SIGTERM, _interrupt)  # a termination request ends the run as Ctrl-C does
    try:
        path = train(config)
    except (RunDirectoryError, DataError, FileNotFoundError) as error:
        return _fail(str(error), 2)
    except (
        ServerError,
        TrainerError,
        RewardError,
        WeightTransferError,
        DisagreementError,
        NothingToLearnError,
    ) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    print(f"run directory: {path}")
    return 0


def _objectives(options: argparse.Namespace) -> int:
    from pipeline.objectives.describe import describe, describe_all

    if options.name is None:
        print(describe_all())
        return 0
    try:
        print(describe(options.name))
    except KeyError as error:
        return _fail(str(error.args[0]), 2)
    return 0


def _add_convert(commands) -> None:
    convert = commands.add_parser("convert", help="Hugging Face directories and Megatron-Core checkpoints")
    directions = convert.add_subparsers(dest="direction", required=True)
    to_megatron = directions.add_parser("to-megatron", help="a Hugging Face directory into a checkpoint")
    to_megatron.add_argument("source", metavar="HF_DIR", type=Path)
    to_megatron.add_argument("out", metavar="OUT", type=Path)
    sizes = {
        "tp": "tensor-parallel ranks",
        "pp": "pipeline stages",
        "vpp": "model chunks a stage",
        "ep": "expert-parallel ranks",
        "etp": "tensor-parallel ranks inside an expert (default: --tp)",
    }
    layout = to_megatron.add_argument_group(
        "layout", "The checkpoint loads in any layout; it loads with the least reading in the one it was written in."
    )
    for name, text in sizes.items():
        layout.add_argument(f"--{name}", type=int, help=text)
    to_hf = directions.add_parser("to-hf", help="a checkpoint into a Hugging Face directory")
    to_hf.add_argument("source", metavar="CKPT", type=Path)
    to_hf.add_argument("out", metavar="OUT", type=Path)
    to_hf.add_argument("--hf", metavar="HF_DIR", type=Path, help="configuration and tokenizer (default: CKPT/hf)")
    to_hf.add_argument(
        "--shard-gb", type=float, default=1.0, help="of one safetensors file, and about the memory needed; default 1"
    )
    for direction in (to_megatron, to_hf):
        direction.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the source's")
        direction.add_argument("--no-verify", dest="verify", action="store_false", help="do not read back and compare")
        direction.add_argument("--overwrite", action="store_true", help="replace OUT, once the new one is whole")


def _convert(options: argparse.Namespace) -> int:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # conversions run on the CPU, beside whatever uses the GPUs
    os.environ["PYTHONWARNINGS"] = "ignore"  # torch's and Megatron-Core's advice is for who writes models
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    from megatron_ext.checkpoint import CheckpointError
    from megatron_ext.convert import command
    from megatron_ext.convert.ranks import RankError
    from megatron_ext.convert.tensors import ConversionError
    from megatron_ext.output import OutputError

    signal.signal(signal.SIGTERM, _interrupt)
    common = {"dtype": options.dtype, "verify": options.verify, "overwrite": options.overwrite}
    try:
        if options.direction == "to-megatron":
            layout = command.layout_of(options.tp, options.pp, options.vpp, options.ep, options.etp)
            report = command.to_megatron(options.source, options.out, layout, **common)
        else:
            shard_bytes = int(options.shard_gb * 1e9)
            report = command.to_hf(options.source, options.out, hf_dir=options.hf, shard_bytes=shard_bytes, **common)
    except (CheckpointError, ConversionError, OutputError, RankError, OSError) as error:
        return _fail(str(error), 1)
    except (KeyError, ValueError) as error:  # another model than config.json says, or one that is not built here
        return _fail(str(error.args[0]) if isinstance(error, KeyError) else str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    if report is not None:
        print(report)
    return 0


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> int:
    print(f"sameroute: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
