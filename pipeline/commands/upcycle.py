"""`sameroute upcycle`: its arguments, and what its failures are called. The work is in `megatron_ext.convert`."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

from pipeline.errors import NOT_STARTED, SamerouteError
from pipeline.imports import lasting_imports


class UpcycleError(SamerouteError):
    """Upcycling began and failed; the message says why."""


class CannotUpcycleError(UpcycleError):
    """Nothing was begun: a model that no mixture is made of, or numbers that do not go together."""

    exit_code = NOT_STARTED


def add_arguments(upcycle: argparse.ArgumentParser) -> None:
    """The two directories and the recipe."""
    upcycle.add_argument("source", metavar="DENSE_HF", type=Path)
    upcycle.add_argument("out", metavar="OUT", type=Path)
    upcycle.add_argument("--experts", type=int, required=True, help="routed experts of every layer")
    upcycle.add_argument("--topk", type=int, required=True, help="experts a token")
    upcycle.add_argument(
        "--granularity",
        type=int,
        default=1,
        help="slices that the feed-forward is cut into, an expert each; equal to --topk, as many parameters are active "
        "as before (default: 1, whole copies)",
    )
    upcycle.add_argument(
        "--shared-width", type=int, default=0, help="inner elements of the feed-forward that every token keeps"
    )
    upcycle.add_argument(
        "--noise", type=float, default=0.0, help="relative noise on every routed weight (default: 0, exact copies)"
    )
    upcycle.add_argument("--router-std", type=float, default=0.02, help="of the router's weights (default: 0.02)")
    upcycle.add_argument("--seed", type=int, default=0, help="of router and noise (default: 0)")
    upcycle.add_argument("--shard-gb", type=float, default=1.0, help="of one safetensors file (default: 1)")
    upcycle.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the source's")
    upcycle.add_argument("--no-verify", dest="verify", action="store_false", help="do not read back and compare")
    upcycle.add_argument("--overwrite", action="store_true", help="replace OUT, once the new one is whole")


def run(options: argparse.Namespace) -> int:
    """0, and what was made is printed. Raises UpcycleError and KeyboardInterrupt."""
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with lasting_imports():
        from megatron_ext.convert.comparison import ConversionError
        from megatron_ext.convert.output import OutputError
        from megatron_ext.convert.upcycling import Recipe, upcycle

    recipe = Recipe(
        experts=options.experts,
        topk=options.topk,
        granularity=options.granularity,
        shared=options.shared_width,
        noise=options.noise,
        router_std=options.router_std,
        seed=options.seed,
    )
    try:
        made = upcycle(
            options.source,
            options.out,
            recipe,
            dtype=options.dtype,
            shard_bytes=int(options.shard_gb * 1e9),
            verify=options.verify,
            overwrite=options.overwrite,
        )
    except FileNotFoundError as error:
        raise CannotUpcycleError(str(error)) from error
    except (ConversionError, OutputError, OSError) as error:
        raise UpcycleError(str(error)) from error
    except KeyError as error:
        raise CannotUpcycleError(str(error.args[0])) from error
    except ValueError as error:
        raise CannotUpcycleError(str(error)) from error
    print(made)
    return 0


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
