"""A run's own Ray: what its workers import, where it listens, and who may join it."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray

from pipeline.cluster.ray_session import RayError, _of_cluster, ray_session
from pipeline.config.run import ClusterConfig
from pipeline.disk.scratch import scratch_folder
from tests.support import preloaded
from tests.support.processes import command_line, name_of
from tests.support.sockets import listening, reachable

PROGRAM = """
import sameroute
sameroute.own_packages_first()
import ray
from pipeline.cluster.ray_session import ray_session
from pipeline.config.run import ClusterConfig

@ray.remote
def where():
    import megatron_ext
    import pipeline.types
    return pipeline.__file__, megatron_ext.__file__

with ray_session(ClusterConfig(object_store_gb=0.1), cpus=1):
    print(*ray.get(where.remote()))
"""


@pytest.mark.slow
def test_workers_import_the_packages_that_the_driver_has(tmp_path):
    for name in ("pipeline", "megatron_ext"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('somebody else')")
    (tmp_path / "program.py").write_text(PROGRAM)
    as_a_user_has_it = {name: value for name, value in os.environ.items() if name not in preloaded.VARIABLES}
    done = subprocess.run(
        [sys.executable, "-P", "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=as_a_user_has_it | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    own = [str(Path(name, "__init__.py").resolve()) for name in ("pipeline", "megatron_ext")]
    assert done.stdout.split() == own


def test_what_torch_compiles_is_kept_from_run_to_run(monkeypatch):
    """So it is not in a run's own folder, which is gone when the run begins again."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if key != name})
    with scratch_folder() as folder:
        _of_cluster(folder)
    kept = Path(os.environ[name])
    assert not kept.is_relative_to(folder)
    assert kept.parent.is_dir()


JOIN = """
import sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
print("joined", len(ray.nodes()))
"""


def join(address, token):
    """Starts a process of anybody's on this machine that knows where the cluster is. token: None has none."""
    # Else it looks for 127.0.0.1 at another address, and tries for 20 s where it is refused.
    alone = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_NUM_REDIS_GET_RETRIES": "2"}
    auth = {"RAY_AUTH_MODE": "disabled"} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    return subprocess.Popen(
        [sys.executable, "-c", JOIN, address], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | alone | auth,
    )  # fmt: skip


@pytest.mark.slow
def test_ray_listens_on_this_machine_only_and_whoever_joins_needs_the_token():
    @ray.remote
    def address():
        return ray.util.get_node_ip_address()

    before = dict(os.environ)
    with ray_session(ClusterConfig(object_store_gb=0.1), cpus=1):
        assert ray.get(address.remote()) == "127.0.0.1"
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        sockets = listening(processes)
        assert any("gcs" in socket.process for socket in sockets)
        # of the autoscaler and of logs, the dashboard's and what answers it
        unused = ("monitor.py", "dashboard.py", "dashboard/agent.py", "DashboardAgent")
        assert not [p for p in processes if any(name in command_line(p) for name in unused)]
        found = reachable(sockets)
        assert found == [], "\n".join(map(str, found))
        (gcs,) = [process for process in processes if name_of(process) == "gcs_server"]
        token, place = gcs.environ()["RAY_AUTH_TOKEN"], ray.get_runtime_context().gcs_address
        assert len(token) == 64
        assert token not in os.environ.values()
        assert not [p for p in processes if token in command_line(p)]
        strangers = [join(place, other) for other in (token, "0" * 64, None)]
        said = [stranger.communicate(timeout=120)[0] for stranger in strangers]
        assert [stranger.returncode for stranger in strangers] == [0, 1, 1], said
        assert "joined 1" in said[0]
        assert all("oken" in text and "Failed to connect" in text for text in said[1:]), said
    with pytest.raises(ray.exceptions.RaySystemError, match="not been started"):  # nor is another begun
        ray.put(1)
    changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
    assert not changed & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TMPDIR"}


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_a_ray_that_does_not_start_is_one_sentence(address, monkeypatch):
    def slow(**_):
        raise Exception("The current node timed out during startup.\nThis could happen because ...")

    monkeypatch.setattr(ray, "init", slow)
    where = address or "local"
    words = rf"Ray did not start \(address={where}\): The current node timed out during startup. This could"
    with pytest.raises(RayError, match=words), ray_session(ClusterConfig(address=address), cpus=1):
        pass
