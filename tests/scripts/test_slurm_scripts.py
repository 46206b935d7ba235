"""scripts/slurm/ with stand-ins for srun, scontrol, nvidia-smi and containers; on a real Slurm: tests/slurm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "scripts" / "slurm"
SCONTROL = """case "$1 $2" in
"show job") echo "   JobState=RUNNING Reason=None Dependency=(null)" ;;
"show hostnames") printf "%s\\n" $3 ;;
*) echo "scontrol $*" ;;
esac"""


@pytest.fixture
def bash(tmp_path):
    """Runs a script in a job's environment; commands of `stand_in` come first on PATH."""
    commands = tmp_path / "bin"
    commands.mkdir()

    def stand_in(name: str, body: str) -> None:
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)

    def run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "SAMEROUTE_ROOT": str(ROOT),
            "SAMEROUTE_LOGS": str(tmp_path / "logs"),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n1 n2 n3",
            "SLURM_JOB_NUM_NODES": "3",
        }
        return subprocess.run(
            ["bash", "-c", script],
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    stand_in("scontrol", SCONTROL)
    stand_in("srun", 'echo "srun $*"')
    run.stand_in = stand_in
    return run


def common(script: str) -> str:
    return f"source {SLURM}/common.sh; {script}"


def test_the_last_nodes_or_all_components_but_the_first_are_rollout_nodes(bash):
    assert bash(common("rollout_nodes")).stdout == ""
    assert bash(common("rollout_nodes"), SAMEROUTE_ROLLOUT_NODES="2").stdout.split() == ["n2", "n3"]
    groups = {"SLURM_HET_SIZE": "2", "SLURM_JOB_NODELIST_HET_GROUP_0": "a b", "SLURM_JOB_NODELIST_HET_GROUP_1": "c"}
    assert bash(common("all_nodes"), **groups).stdout.split() == ["a", "b", "c"]
    assert bash(common("rollout_nodes"), **groups).stdout.split() == ["c"]
    assert "--het-group=0-1" in bash(common("(on_nodes -- true)"), **groups).stdout


def test_one_variable_chooses_the_runtime_of_every_step(bash):
    step = common("(on_nodes --output=x -- bash ray_node.sh CONFIG)")
    common_words = "srun --ntasks-per-node=1 --cpu-bind=none --nodes=3 --ntasks=3 --output=x"
    assert bash(step).stdout == f"{common_words} bash ray_node.sh CONFIG\n"
    given = {"SAMEROUTE_IMAGE": "/images/it", "SAMEROUTE_MOUNTS": "/data:/data"}
    mounts = f"{ROOT}:{ROOT},"
    pyxis = bash(step, SAMEROUTE_RUNTIME="pyxis", **given).stdout
    assert pyxis.startswith(f"{common_words} --container-image=/images/it --container-mounts={mounts}")
    assert ",/data:/data --container-workdir=" in pyxis
    assert pyxis.endswith(" bash ray_node.sh CONFIG\n")
    apptainer = bash(step, SAMEROUTE_RUNTIME="apptainer", SLURM_GPUS_ON_NODE="8", **given).stdout
    assert apptainer.startswith(f"{common_words} apptainer exec --nv --bind {mounts}")
    assert apptainer.endswith(f",/data:/data --pwd {ROOT} /images/it bash ray_node.sh CONFIG\n")
    assert "--nv" not in bash(step, SAMEROUTE_RUNTIME="apptainer", **given).stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SAMEROUTE_RUNTIME": "podman"}, "SAMEROUTE_RUNTIME is bare, pyxis or apptainer, not podman"),
        ({"SAMEROUTE_RUNTIME": "pyxis"}, "SAMEROUTE_RUNTIME=pyxis needs SAMEROUTE_IMAGE"),
        ({"SAMEROUTE_ROLLOUT_NODES": "3"}, "SAMEROUTE_ROLLOUT_NODES=3 of 3 nodes leave none for the trainer"),
    ],
)
def test_settings_that_cannot_work_exit_with_2(bash, variables, message):
    done = bash(common("begin"), **variables)
    assert (done.returncode, message in done.stdout) == (2, True)


def test_a_saved_run_is_queued_again_unless_it_was_cancelled_or_has_had_its_attempts(bash):
    finish = "sleep() { :; }; finish %s"
    saved = bash(common(finish % "75 ''"))
    assert (saved.returncode, "scontrol requeue 7" in saved.stdout) == (75, True)
    for script, variables in [
        (finish % "75 yes", {}),
        (finish % "1 ''", {}),
        (finish % "0 ''", {}),
        (finish % "75 ''", {"SLURM_RESTART_COUNT": "3", "SAMEROUTE_MAX_ATTEMPTS": "3"}),
    ]:
        done = bash(common(script), **variables)
        assert done.returncode == int(script.split()[-2])
        assert "requeue" not in done.stdout


def test_a_run_that_failed_is_queued_again_only_where_a_node_is_lost(bash):
    failed = common("sleep() { :; }; finish 1 ''")
    assert "requeue" not in bash(failed).stdout
    bash.stand_in("srun", "exit 1")
    done = bash(failed)
    assert done.returncode == 1
    assert "a node of the job is lost" in done.stdout
    assert "scontrol requeue 7" in done.stdout
    for code in (0, 2, 3, 130):
        assert "requeue" not in bash(common(f"sleep() {{ :; }}; finish {code} ''")).stdout
    assert "requeue" not in bash(common("sleep() { :; }; finish 1 yes")).stdout


@pytest.mark.parametrize("code", [75, 1, 143])
def test_a_job_that_scancel_ends_is_not_queued_again_though_its_script_has_no_signal_yet(bash, code):
    bash.stand_in("srun", "exit 1")  # as a step of such a job ends: a lost node looks the same
    bash.stand_in("scontrol", SCONTROL.replace("RUNNING", "COMPLETING"))
    done = bash(common(f"sleep() {{ :; }}; finish {code} ''"))
    assert done.returncode == code
    assert "requeue" not in done.stdout


def test_the_runs_own_exit_code_counts_not_that_of_a_node_which_was_lost(bash, tmp_path):
    bash.stand_in("srun", 'case "$*" in *ray_node*) echo 0 > "$ATTEMPT_FOLDER/run_ended"; exit 137 ;; esac')
    bash.stand_in("ip", 'echo "1: lo    inet 127.0.0.1/8 scope"')
    done = bash(common("run_training CONFIG"), SAMEROUTE_INTERFACE="lo")
    assert "attempt 0 ended with exit code 0" in done.stdout
    assert done.returncode == 0


def test_a_run_that_cannot_be_queued_again_keeps_its_exit_code(bash):
    bash.stand_in(
        "scontrol", SCONTROL.replace('echo "scontrol $*"', "echo Requested operation is presently disabled; exit 1")
    )
    done = bash(common("finish 75 ''"))
    assert done.returncode == 75
    assert "Slurm did not put the job back into the queue" in done.stdout


@pytest.fixture
def address(bash):
    """The address of node n1, whose first is 10.0.0.5, where getent and ip answer so."""
    bash.stand_in("hostname", '[ "${1:-}" = -I ] && echo "10.0.0.5 10.1.0.5" || echo n1')

    def ask(getent: str = "exit 2", ip: str = "exit 1", **variables: str) -> subprocess.CompletedProcess[str]:
        bash.stand_in("getent", getent)
        bash.stand_in("ip", ip)
        return bash(f"bash {SLURM}/address.sh", **variables)

    return ask


def test_the_address_is_the_interfaces_else_the_names_else_the_first(address):
    shown = 'echo "2: ib0    inet 10.9.0.5/16 scope"; echo "2: ib0    inet 10.9.0.6/16 scope"'
    assert address(ip=shown, SAMEROUTE_INTERFACE="ib0").stdout == "10.9.0.5\n"
    assert address(getent="echo 127.0.1.1 STREAM n1; echo 10.2.0.5 STREAM").stdout == "10.2.0.5\n"
    assert address(getent="echo 127.0.1.1 STREAM n1").stdout == "10.0.0.5\n"
    assert address().stdout == "10.0.0.5\n"  # a name that nobody resolves
    missing = address(SAMEROUTE_INTERFACE="ib0")
    assert (missing.returncode, missing.stdout) == (
        3,
        "sameroute: n1 has no IPv4 address on ib0; set SAMEROUTE_INTERFACE\n",
    )


def test_the_other_nodes_end_with_a_head_node_whose_ray_never_answered(bash, tmp_path):
    bash.stand_in("ip", 'echo "1: lo    inet 127.0.0.1/8 scope"')
    bash.stand_in("ray", "exit 9")
    node = {
        "SAMEROUTE_INTERFACE": "lo", "SAMEROUTE_SCRATCH": str(tmp_path), "ATTEMPT_FOLDER": str(tmp_path),
        "ATTEMPT": "0", "NODES": "2", "ROLLOUT_NODES": "", "HEAD_NODE": "n1", "HEAD_ADDRESS": "127.0.0.1",
        "RAY_PORT": "1",
    }  # fmt: skip
    head, other = (
        bash(f"timeout 30 bash {SLURM}/ray_node.sh CONFIG", SLURMD_NODENAME=name, **node) for name in ("n1", "n2")
    )
    assert head.returncode == 9
    assert other.returncode == 0
    assert not (tmp_path / "sr7").exists()


def test_a_conversion_is_a_rank_a_task_with_the_cores_that_were_asked_for(bash):
    bash.stand_in("ip", 'echo "1: lo    inet 127.0.0.1/8 scope"')
    variables = {"SAMEROUTE_INTERFACE": "lo", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "4"}
    done = bash(f"bash {SLURM}/convert.sbatch to-hf 'A B' OUT", **variables)
    assert "srun --cpus-per-task=4 bash -c RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS " in done.stdout
    assert done.stdout.endswith(" _ to-hf A B OUT\n")


def test_what_is_set_before_sbatch_wins_over_network_env(bash):
    show = f'set -a; source {SLURM}/network.env; echo "$GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME $NCCL_IB_TIMEOUT"'
    assert bash(show, SAMEROUTE_INTERFACE="ib0", NCCL_SOCKET_IFNAME="bond0").stdout == "ib0 bond0 22\n"
    assert bash(show, NCCL_IB_TIMEOUT="18").stdout == "  18\n"


GPU_LINES = "0, 12, 0\n1, 0, [N/A]\n"


@pytest.fixture
def health(bash, tmp_path):
    """The health check on a node that is well but for `variables` and what nvidia-smi prints."""
    (tmp_path / "probe").write_text("7\n")

    def check(smi: str = GPU_LINES, **variables: str) -> subprocess.CompletedProcess[str]:
        for command in ("sameroute", "ray"):
            bash.stand_in(command, ":")
        bash.stand_in("nvidia-smi", f"printf '{smi}'")
        well = {"SAMEROUTE_PROBE": str(tmp_path / "probe"), "SAMEROUTE_SCRATCH": str(tmp_path), "SLURMD_NODENAME": "n1"}
        well |= {"SAMEROUTE_MIN_SHM_GB": "0", "SLURM_GPUS_ON_NODE": "2"}
        return bash(f"bash {SLURM}/health.sh", **(well | variables))

    return check


def test_a_node_that_is_well_says_so(health):
    done = health()
    assert done.returncode == 0
    assert done.stdout.startswith("well n1: 2 GPUs, ")


@pytest.mark.parametrize(
    ("smi", "variables", "message"),
    [
        ("0, 12, 0\n", {}, "it has 1 GPUs of 2"),
        ("0, 12, 0\n1, 30000, 0\n", {}, "GPU 1 has 30000 MiB in use, by a process that is not this job's"),
        ("0, 12, 4\n1, 0, 0\n", {}, "GPU 0 counts 4 uncorrected memory errors"),
        (GPU_LINES, {"SAMEROUTE_PROBE": "/nowhere/probe"}, "it does not see /nowhere"),
        (GPU_LINES, {"SAMEROUTE_MIN_SCRATCH_GB": "999999"}, "less than 999999 GB are free on"),
        (GPU_LINES, {"SAMEROUTE_MIN_SHM_GB": "999999"}, "less than 999999 GB are free in /dev/shm"),
        (GPU_LINES, {"SAMEROUTE_SCRATCH": "/proc/none"}, "cannot write to SAMEROUTE_SCRATCH=/proc/none"),
        (GPU_LINES, {"SAMEROUTE_INTERFACE": "ib99"}, "the interface SAMEROUTE_INTERFACE=ib99 is not there or down"),
        (GPU_LINES, {"NCCL_IB_HCA": "mlx9_0:1"}, "no port of the adapter mlx9_0 is active"),
    ],
)
def test_a_node_that_is_not_well_says_what_is_wrong_and_exits_with_3(health, smi, variables, message):
    done = health(smi, **variables)
    assert done.returncode == 3
    assert f"unwell n1: {message}" in done.stdout
    assert "\nwell" not in done.stdout


def test_a_failing_nvidia_smi_is_told_in_its_own_words(health, bash):
    done = health("Unable to determine the device handle\\n'; exit 9; '")
    assert done.returncode == 3
    assert "nvidia-smi failed: Unable to determine the device handle" in done.stdout
