"""`sameroute convert`: its arguments, and what its failures are called. The work is in `megatron_ext.convert`.

`megatron_ext` knows nothing of exit codes: its errors become messages here.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import warnings
from pathlib import Path

from pipeline.errors import NOT_STARTED, SamerouteError
from pipeline.imports import lasting_imports

_SIZES = {
    "tp": "tensor-parallel ranks",
    "pp": "pipeline stages",
    "vpp": "model chunks a stage",
    "ep": "expert-parallel ranks",
    "etp": "tensor-parallel ranks inside an expert (default: --tp)",
}


class ConvertError(SamerouteError):
    """A conversion began and failed; the message says why."""


class CannotConvertError(ConvertError):
    """What was asked for cannot be converted: a layout, a name or a model."""

    exit_code = NOT_STARTED


def add_arguments(convert: argparse.ArgumentParser) -> None:
    """The two directions and their options."""
    directions = convert.add_subparsers(dest="direction", required=True)
    to_megatron = directions.add_parser("to-megatron", help="a Hugging Face directory into a checkpoint")
    to_megatron.add_argument("source", metavar="HF_DIR", type=Path)
    to_megatron.add_argument("out", metavar="OUT", type=Path)
    layout = to_megatron.add_argument_group(
        "layout", "The checkpoint loads in any layout; with the least reading in the one it was written in."
    )
    for name, text in _SIZES.items():
        layout.add_argument(f"--{name}", type=int, help=text)
    to_hf = directions.add_parser("to-hf", help="a checkpoint into a Hugging Face directory")
    to_hf.add_argument("source", metavar="CKPT", type=Path)
    to_hf.add_argument("out", metavar="OUT", type=Path)
    to_hf.add_argument("--hf", metavar="HF_DIR", type=Path, help="configuration and tokenizer (default: CKPT/hf)")
    to_hf.add_argument("--shard-gb", type=float, default=1.0, help="of one safetensors file (default: 1)")
    to_peft = directions.add_parser("to-peft", help="the adapters of a checkpoint into a directory for PEFT")
    to_peft.add_argument("source", metavar="CKPT", type=Path)
    to_peft.add_argument("out", metavar="OUT", type=Path)
    to_peft.add_argument("--overwrite", action="store_true", help="replace OUT, once the new one is whole")
    for direction in (to_hf, to_peft):
        direction.add_argument("--base", metavar="HF_DIR", type=Path, help="the model of a checkpoint's adapters")
    for direction in (to_megatron, to_hf):
        direction.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the source's")
        direction.add_argument("--no-verify", dest="verify", action="store_false", help="do not read back and compare")
        direction.add_argument("--overwrite", action="store_true", help="replace OUT, once the new one is whole")


def run(options: argparse.Namespace) -> int:
    """0, and what was done is printed, on the first rank of a launcher. Raises ConvertError and KeyboardInterrupt."""
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # conversions run on the CPU, beside whatever uses the GPUs
    os.environ["PYTHONWARNINGS"] = "ignore"  # torch's and Megatron-Core's advice is for who writes models
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # of CUDA, which was hidden from it
    with lasting_imports():
        from megatron_ext.checkpoint.names import CheckpointError
        from megatron_ext.convert import conversion
        from megatron_ext.convert.comparison import ConversionError
        from megatron_ext.convert.output import OutputError
        from megatron_ext.convert.ranks import RankError

    common = {"overwrite": options.overwrite}
    if options.direction != "to-peft":
        common |= {"dtype": options.dtype, "verify": options.verify}
    try:
        if options.direction == "to-peft":
            report = conversion.to_peft(options.source, options.out, base=options.base, **common)
        elif options.direction == "to-megatron":
            layout = conversion.layout_of(**{name: getattr(options, name) for name in _SIZES})
            report = conversion.to_megatron(options.source, options.out, layout, **common)
        else:
            size = int(options.shard_gb * 1e9)
            report = conversion.to_hf(
                options.source, options.out, hf_dir=options.hf, shard_bytes=size, base=options.base, **common
            )
    except (CheckpointError, ConversionError, OutputError, RankError, OSError) as error:
        raise ConvertError(str(error)) from error
    except KeyError as error:
        raise CannotConvertError(str(error.args[0])) from error
    except ValueError as error:  # another model than config.json says, or one that is not built here
        raise CannotConvertError(str(error)) from error
    if report is not None:
        print(report)
    return 0


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
