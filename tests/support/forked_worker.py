"""A Ray worker forked by `preloaded_worker.py`: what Ray starts in place of Python, with a worker's command line."""

import os
import sys

from pipeline.forks import ask, end_as

end_as(ask(os.environ["SAMEROUTE_WORKER_FORKS"], sys.argv[1:]))
