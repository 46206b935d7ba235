"""One node of a Ray cluster, the first process of a node of two_nodes.sh:

    python -m tests.support.ray_node 1|2 FOLDER

The first is the head and has room for a trainer rank; both have room for one process of a server. Servers are forked
from a process of the node's own, which has made SGLang's imports, for one elsewhere has another network; FOLDER/forks1
or forks2 says where it listens.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from pipeline.config.server import ServerConfig
from pipeline.engine.inside.preloaded import importing
from pipeline.forks import FORKS_VARIABLE

HEAD, PORT = "10.78.0.11", 6379


def main() -> None:
    """Until the namespace ends."""
    number, folder = int(sys.argv[1]), Path(sys.argv[2])
    roles = {"rollout": 1} | ({"trainer": 1} if number == 1 else {})
    place = folder / f"ray{number}"
    (place / "tmp").mkdir(parents=True)
    os.environ["TMPDIR"] = str(place / "tmp")
    where = ["--head", f"--port={PORT}", "--include-dashboard=false"] if number == 1 else [f"--address={HEAD}:{PORT}"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *where, "--disable-usage-stats",
               f"--node-ip-address=10.78.0.1{number}", f"--temp-dir={place}", "--num-cpus=2",
               f"--resources={str(roles).replace(chr(39), chr(34))}", "--object-store-memory=150000000"]  # fmt: skip
    with importing(ServerConfig(cpu_threads=1)):  # pyright: ignore[reportCallIssue]
        unfinished = folder / f"forks{number}.partial"
        unfinished.write_text(os.environ[FORKS_VARIABLE])
        unfinished.rename(folder / f"forks{number}")
        while subprocess.run(command).returncode and number != 1:  # the head is not there yet
            time.sleep(0.5)


if __name__ == "__main__":
    main()
