"""Ray for one run: a cluster of its own on this machine, or one that is there joined. Nothing of it is left.

Whoever joins a Ray cluster runs code in it. One of a run's own is reached from this machine only, and opened by a token
of its own: Ray's (2.60) own default is one token for all of a user's clusters, in a file that others may read.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray._private import auto_init_hook, ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue] - compiled
from ray.job_config import JobConfig

from pipeline.cluster import loopback
from pipeline.cluster.object_store import LEAST_GB
from pipeline.cluster.placement import PlacementError
from pipeline.cluster.ray_processes import (
    died_said,
    end_own_cluster,
    leave_out_the_raylets_log,
    only_what_runs_actors,
)
from pipeline.config.run import ClusterConfig
from pipeline.deaf import deaf_children
from pipeline.errors import SamerouteError
from pipeline.imports import own_folder
from pipeline.socket_folder import make_socket_folder

# Ray puts /session_2026-01-02_03-04-05_123456_1234567/sockets/plasma_store behind it, 66 bytes of 107.
_LONGEST_FOLDER = 40


class RayError(SamerouteError):
    """Ray cannot be had; the message has its own words."""


@contextlib.contextmanager
def ray_session(config: ClusterConfig, *, cpus: int) -> Iterator[None]:
    """Ray is up inside. cpus: that a cluster started here has. Raises PlacementError for no place for its sockets,
    RayError where it does not start."""
    on_termination = signal.getsignal(signal.SIGTERM)
    leave_out_the_raylets_log()
    # A thread that comes too late, when this run's Ray has ended, would start another that nobody ends (2.60).
    auto_init_hook.enable_auto_connect = False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves a trainer that shares a laptop's cores
    with contextlib.ExitStack() as stack:
        if config.address is None:
            folder = _folder()
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.callback(_read_token)
            stack.callback(end_own_cluster)  # before: Ray's processes write there until they end
            with _environment(_of_cluster(folder)), _at_loopback(), only_what_runs_actors(), deaf_children():
                _read_token()
                _init(
                    address="local",  # never another run's cluster on this machine
                    num_cpus=cpus,
                    _node_ip_address=loopback.ADDRESS,
                    include_dashboard=False,
                    object_store_memory=int((config.object_store_gb or LEAST_GB) * 1e9),
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    _temp_dir=str(folder),
                    job_config=_own_path(),
                )
        else:
            stack.callback(ray.shutdown)
            _init(address=config.address, logging_level=logging.ERROR, log_to_driver=False, job_config=_own_path())
        # Ray takes SIGTERM over and aborts the process in the middle of its own clean-up (2.60); the caller's stays.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_termination)
        with died_said():
            yield


def _init(**arguments: Any) -> None:
    try:
        ray.init(**arguments)
    except Exception as error:  # of any kind, a plain one too (2.60)
        words = " ".join(str(error).split())[:300]
        raise RayError(
            f"Ray did not start (address={arguments['address']}): {words}; a machine that is very busy, or short of "
            "memory, may have it at another try"
        ) from error


def _own_path() -> JobConfig:
    """Workers have the folder of the packages first on their path, and not the working directory: Ray (2.60) puts that
    first of all but in jobs of its client, where a `pipeline.py` of the user's would take the package's place."""
    return JobConfig(_client_job=True, _py_driver_sys_path=_StaysLast(own_folder()))


class _StaysLast(list[str]):
    """Ray adds the folder of a script, and a worker puts every folder before those that it has had."""

    def extend(self, folders: Iterable[str], /) -> None:
        self[:0] = folders


def _of_cluster(folder: Path) -> dict[str, str]:
    """Environment of Ray's processes and workers. They have their temporary files in `folder`: torch's manager of
    shared memory binds a socket among them, and ranks that are killed at the end of a run leave others."""
    # What torch.compile keeps from run to run stays where it is, which is not in a run's own folder.
    now = Path(tempfile.gettempdir())
    cache = (now.parent if now.name.startswith("sameroute-") else now) / f"torchinductor_{os.getuid()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    alone = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
    return {"TMPDIR": str(folder)} | token | alone | loopback.loopback_environment()


def _read_token() -> None:
    """Ray reads from the environment whether there is a token, and which; it does so once, when first asked."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _at_loopback() -> Iterator[None]:
    """Ray takes 127.0.0.1 for its node and then listens nowhere else. It replaces that by an address of the machine
    that others reach, unless it is told, by a variable that it reads when it is imported, that a cluster has one node.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Processes that are started inside have these."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _folder() -> Path:
    try:
        return make_socket_folder(_LONGEST_FOLDER)
    except OSError as error:
        raise PlacementError(str(error)) from error
