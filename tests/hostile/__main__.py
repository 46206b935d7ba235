"""1,000 hostile programs among 1,000 right ones: each graded as it is, the right ones no slower, nothing left.

    .venv/bin/python -m tests.hostile [--programs 1000] [--as-nobody]

As root it runs twice: as an unprivileged user, in a mount namespace where that one can read this Python, and with a
tenth of the programs as root.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import subprocess
import sys
import time
from collections import Counter

import numpy as np

from pipeline.rewards import Grader
from tests.support.programs import RIGHT, Watch, question, running, verifier
from tests.support.unprivileged import as_nobody

WORKERS = 8
SLOWER = 2.0
"""So many times the latency alone may the right programs' be, at the 95th percentile."""

ENOUGH = 100
"""Programs of which that percentile says something; of ten it is the slowest, which one pause of the machine makes."""


def main() -> int:
    """0 where all is well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--programs", type=int, default=1000, help="right ones, and hostile ones")
    parser.add_argument("--as-nobody", action="store_true", help="only as an unprivileged user")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside or os.geteuid() != 0:
        return measure(arguments.programs)
    words = [sys.executable, "-m", "tests.hostile", "--inside", "--programs"]
    codes = [subprocess.run(as_nobody([*words, str(arguments.programs)])).returncode]
    if not arguments.as_nobody:
        codes.append(subprocess.run([*words, str(max(1, arguments.programs // 10))]).returncode)
    return max(codes)


def measure(count: int) -> int:
    """Right programs alone, then among hostile ones."""
    print(f"user {os.geteuid()}: {count} right and {count} hostile programs, {WORKERS} at a time", flush=True)
    with Watch() as watch, Grader([verifier()], workers=WORKERS) as grader:
        grader.wait_ready()
        right = [("right", text) for text in itertools.islice(itertools.cycle(RIGHT), count)]
        hostile = list(itertools.islice(itertools.cycle(watch.programs().items()), count))
        alone = _asked(grader, right)
        mixed = [pair for two in zip(right, hostile, strict=True) for pair in two]
        random.Random(0).shuffle(mixed)
        among = _asked(grader, mixed)
        wrong = [f"{what}: {verdict}" for what, verdict in (*alone, *among) if verdict.reward != float(what == "right")]
        left = watch.left() + [f"process {process}" for process in running()]
    latencies = [[v.seconds for what, v in some if what == "right"] for some in (alone, among)]
    before, after = (float(np.percentile(some, 95)) for some in latencies)
    failed = [v for what, v in among if v.kind is not None]
    print(f"graded otherwise than they are: {len(wrong)} {wrong[:5]}")
    print(f"failures of the verifier: {len(failed)} {Counter(v.kind for v in failed)}")
    print(f"left behind: {left}")
    times = f"{before:.3f} s alone, {after:.3f} s among hostile ones, {after / before:.2f} times"
    print(f"95th percentile of right ones: {times}")
    late = after > SLOWER * before
    if late and count < ENOUGH:
        print(f"of {count} programs that is not judged")
    return int(bool(wrong or left) or (late and count >= ENOUGH))


def _asked(grader, programs):
    """(what, verdict) of each."""
    start = time.monotonic()
    verdicts = grader.ask([question(text, index) for index, (_, text) in enumerate(programs)])
    print(f"  {len(programs)} programs in {time.monotonic() - start:.1f} s", flush=True)
    return [(what, verdict) for (what, _), verdict in zip(programs, verdicts, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
