"""A Ray worker forked by `preloaded_imports.py`: what Ray starts in place of Python, with a worker's command line.

Where it also stands in place of the script by which Ray sets a worker up (`preloaded.set_up_by_a_fork`), it does what
that one does: half a second of a processor a worker goes into that one's imports.
"""

import argparse
import json
import os
import sys

from pipeline.forks import ask, end_as


def main() -> None:
    setup = argparse.ArgumentParser(allow_abbrev=False)
    setup.add_argument("--serialized-runtime-env-context", default="{}")
    setup.add_argument("--language")
    found, arguments = setup.parse_known_args(sys.argv[1:])
    os.environ.update(json.loads(found.serialized_runtime_env_context).get("env_vars") or {})
    end_as(ask(os.environ["SAMEROUTE_WORKER_FORKS"], arguments))


if __name__ == "__main__":
    main()
