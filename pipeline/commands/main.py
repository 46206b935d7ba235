"""The command `sameroute`: its parser, and what its failures look like. Each command stands in a file of its own.

Nothing heavy is imported before the arguments are read, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from types import TracebackType

from pipeline.commands import (
    chat,
    convert,
    diagnose,
    evaluate,
    launch,
    objectives,
    plan,
    regrade,
    report,
    train,
    upcycle,
)
from pipeline.commands.running import servers_of_run
from pipeline.commands.version import ShowVersion
from pipeline.errors import INTERRUPTED, SamerouteError
from pipeline.text.characters import visible
from pipeline.text.standard_streams import make_patient

COMMANDS = {
    "train": (train, "run a configuration: supervised steps, then reinforcement learning"),
    "evaluate": (evaluate, "answer the sets of a configuration with a model: pass@k, majority@k, lengths"),
    "chat": (chat, "talk to a checkpoint of a run"),
    "diagnose": (diagnose, "why trainer and server disagree, by exchanging one part at a time"),
    "objectives": (objectives, "the table of objectives, or one with its equation"),
    "report": (report, "figures of a finished or running run, in one HTML file"),
    "servers": (servers_of_run, "the servers of a run that goes on: add one, take one out, start one for it"),
    "regrade": (regrade, "the kept answers of a run, graded again by its rewards or others"),
    "convert": (convert, "Hugging Face directories and Megatron-Core checkpoints"),
    "upcycle": (upcycle, "a dense model into a mixture of experts that computes the same"),
    "launch": (launch, "submit a configuration to a cluster"),
    "plan": (plan, "whether a configuration fits its machines, and how long a step takes"),
}


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: see `pipeline.errors`."""
    sys.excepthook = _show_uncaught
    make_patient()
    options = _parse(arguments)
    module, _ = COMMANDS[options.command]
    try:
        return module.run(options)
    except SamerouteError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sameroute", description="Reinforcement learning for mixture-of-experts language models."
    )
    parser.add_argument("--version", action=ShowVersion, help="of sameroute and its engines")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=text))
    options, rest = parser.parse_known_args(arguments)
    # argparse takes the overrides before the first option only; they may stand anywhere.
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _fail(message: str, code: int) -> int:
    print(f"sameroute: {visible(message)}", file=sys.stderr)
    return code


def _show_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A traceback whose message may hold what a model wrote."""
    sys.stderr.write(visible("".join(traceback.format_exception(kind, error, trace))))


if __name__ == "__main__":
    sys.exit(main())
