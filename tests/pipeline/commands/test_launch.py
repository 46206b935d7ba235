"""`sameroute launch slurm`."""

from __future__ import annotations

import os
import subprocess

import pytest

from pipeline.cluster.slurm import ROOT
from pipeline.commands.main import main
from pipeline.config import ConfigError, load_config_and_model

# base.yaml and parts/ are what the others inherit from
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.name != "base.yaml" and p.parent.name != "parts")
QUICKSTART = "configs/quickstart.yaml"
GPUS = ["device=cuda", "precision.weights=bfloat16", "parallel={ranks: 16}"]


@pytest.fixture
def launch(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)

    def run(*words: str) -> tuple[int, str]:
        code = main(["launch", "slurm", *words])
        output = capsys.readouterr()
        return code, output.out + output.err

    return run


@pytest.mark.parametrize("config", CONFIGS, ids=[str(p.relative_to(ROOT)) for p in CONFIGS])
def test_a_dry_run_of_every_config_prints_a_script_that_bash_reads(launch, config):
    code, script = launch(str(config), "--partition", "gpu", "--time", "4:00:00", "--dry-run")
    assert code == 0, script
    assert ("export SAMEROUTE_OWN_RAY=1\n" in script) == load_config_and_model(config)[0].cluster.colocated
    assert "#SBATCH --partition=gpu\n" in script
    assert "#SBATCH --signal=B:USR1@" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0


def test_the_script_passes_overrides_as_they_were_given(launch, tmp_path):
    odd = ["""rewards=a:b""", "parallel={ranks: 2, expert: 2}", "run.directory=/a b/$HOME'x"]
    code, script = launch(QUICKSTART, "--dry-run", *odd, "--nodes", "2", "train.steps=3")
    assert code == 0
    library = tmp_path / "scripts" / "slurm"
    library.mkdir(parents=True)
    (library / "common.sh").write_text('run_training() { printf "%s\\n" "$@"; }\n')
    script = script.replace(f"export SAMEROUTE_ROOT={ROOT}", f"export SAMEROUTE_ROOT={tmp_path}")
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, env={"SLURM_SUBMIT_DIR": "/"})
    assert done.stdout.splitlines() == [str(ROOT / QUICKSTART), *odd, "train.steps=3"]


def test_gpus_that_the_trainer_leaves_become_rollout_nodes_with_as_many_servers_as_fit(launch):
    code, script = launch(QUICKSTART, "--dry-run", *GPUS, "--nodes", "3", "server.tensor_parallel=4")
    assert code == 0
    assert "#SBATCH --nodes=3\n#SBATCH --gpus-per-node=8\n" in script
    assert "export SAMEROUTE_ROLLOUT_NODES=1\n" in script
    assert " server.replicas=2\n" in script


def test_a_server_of_more_gpus_than_a_node_takes_whole_nodes(launch):
    code, script = launch(QUICKSTART, "--dry-run", *GPUS, "--nodes", "7", "server.tensor_parallel=16")
    assert code == 0, script
    assert "export SAMEROUTE_ROLLOUT_NODES=5\n" in script
    assert " server.replicas=2\n" in script, "the fifth is left over"
    part = [*GPUS, "parallel={ranks: 12}", "--nodes", "3", "server.tensor_parallel=16"]
    code, output = launch(QUICKSTART, *part)
    assert (code, "have room for 0 servers of server.tensor_parallel=16" in output) == (2, True), output
    assert " server.replicas=1\n" in launch(QUICKSTART, "--dry-run", *part, "--nodes", "4")[1]


def test_supervised_steps_alone_take_the_trainers_nodes_and_run_on_them(launch):
    config, steps = "configs/qwen3-30b-a3b/4-nodes.yaml", ["supervised.steps=9"]
    code, script = launch(config, "--dry-run", "--job", "sft", *steps)
    assert code == 0, script
    assert "#SBATCH --nodes=2\n" in script
    assert "export SAMEROUTE_ROLLOUT_NODES=0\n" in script
    # what the job then asks for, see ray_node.sh
    own = [*steps, "train.steps=0", "cluster.nodes=2", "cluster.gpus_per_node=8"]
    assert load_config_and_model(config, own)[0].rollout_gpus == 0
    with pytest.raises(ConfigError, match=r"leave 0 for a server of server\.tensor_parallel=2"):
        load_config_and_model(config, [*own, "train.steps=1"])


def test_rollout_nodes_of_another_partition_make_a_heterogeneous_job(launch):
    words = ["--nodes", "3", "--rollout-nodes", "1", "--rollout-partition", "l40", "--rollout-gpus-per-node", "4"]
    code, script = launch(QUICKSTART, "--dry-run", *GPUS, *words, "--partition", "h100", "--sbatch=--mem=0")
    assert code == 0
    first, second = script.split("#SBATCH hetjob\n")
    assert "#SBATCH --nodes=2\n#SBATCH --gpus-per-node=8\n#SBATCH --partition=h100\n" in first
    assert "#SBATCH --mem=0\n" in first
    assert "#SBATCH --nodes=1\n#SBATCH --gpus-per-node=4\n#SBATCH --partition=l40\n" in second
    assert "export SAMEROUTE_ROLLOUT_NODES=0\n" in second
    assert " server.replicas=4\n" in second


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*GPUS, "--nodes", "1"], "parallel.ranks=16 needs more than the 8 GPUs of 1 trainer nodes"),
        ([*GPUS, "--nodes", "2"], "2 nodes with parallel.ranks=16 have room for 0 servers"),
        (["--nodes", "2", "--rollout-nodes", "2"], "--rollout-nodes 2 of 2 nodes leave none for the trainer"),
        (
            [*GPUS, "--nodes", "9", "server.tensor_parallel=20"],
            "server.tensor_parallel=20 does not divide among the 3 machines of 8 that it takes; set 16 or 24",
        ),
        (
            [*GPUS, "parallel={ranks: 8}", "cluster.colocated=true", "--nodes", "2"],
            "cluster.colocated takes turns on one machine; leave out --nodes",
        ),
        (["--rollout-partition", "l40"], "rollout nodes of another kind need --rollout-nodes"),
        (["--runtime", "apptainer"], "--runtime apptainer needs --image"),
        (["--job", "sft", "supervised.steps=0"], "there are no supervised steps; set supervised.steps"),
        (["train.stepz=1"], "train.stepz: there is no such key"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_submitted(launch, words, message):
    code, output = launch(QUICKSTART, *words)
    assert code == 2
    assert message in output


def test_a_submission_names_the_job_its_log_and_how_to_end_it_and_a_refusal_says_why(launch, tmp_path, monkeypatch):
    for name in ("scripts", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setattr("pipeline.cluster.slurm.ROOT", tmp_path)
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    sbatch.write_text(f"#!/bin/bash\ncat > {tmp_path}/submitted\necho '4711;cluster'\n")
    sbatch.chmod(0o755)
    code, output = launch(QUICKSTART, "--job", "sft", "--nodes", "2")
    assert code == 0
    assert "job 4711: log" in output
    assert "scancel 4711" in output
    assert "train.steps=0" in (tmp_path / "submitted").read_text()
    sbatch.write_text("#!/bin/bash\necho 'invalid partition' >&2\nexit 1\n")
    refused = (1, "sameroute: sbatch refused the job: invalid partition\n")
    assert launch(QUICKSTART, "checkpoint.every_steps=5") == refused
    assert "checkpoint.every_steps is null, so what ends this job early ends the run" in launch(QUICKSTART)[1]
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    code, output = launch(QUICKSTART)
    assert code == 2
    assert "there is no sbatch on this machine; --dry-run prints the script" in output


def test_what_is_no_override_is_refused_wherever_it_stands(launch):
    with pytest.raises(SystemExit):
        launch(QUICKSTART, "--dry-run", "--no-such-option", "a.b=1")
    with pytest.raises(SystemExit):
        main(["objectives", "gspo", "more"])
