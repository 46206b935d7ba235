"""`sameroute plan` says whether a configuration fits, and if not, what would."""

import json

import pytest

from pipeline.commands.main import main

ONE_NODE = "configs/qwen3-30b-a3b/1-node.yaml"
TWO_NODES = "configs/qwen3-30b-a3b/2-nodes.yaml"


def planned(capsys, *arguments):
    code = main(["plan", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_plan_that_fits_ends_with_0_and_adds_up(capsys):
    code, plan = planned(capsys, TWO_NODES)
    assert (code, plan["fits"], plan["reasons"]) == (0, True, [])
    total = 30_532_122_624
    assert plan["parameters"] == {"total": total, "active": 3_353_032_704, "trained": total}
    parts = plan["trainer_bytes"]
    held = ("weights", "gradients", "optimizer", "reference_and_critic", "activations", "routes", "lm_head", "overhead")
    assert parts["total"] == pytest.approx(sum(parts[name] for name in held))
    assert parts["total"] < parts["capacity"]
    assert plan["step"]["weight_transfer_bytes"] == 2 * 30_532_122_624
    assert plan["step"]["route_bytes"] == pytest.approx(plan["step"]["tokens"] * 48 * 8)
    seconds = plan["seconds"]
    assert seconds["step"] == pytest.approx(sum(seconds[n] for n in ("rollout", "logprobs", "update", "sync")))


def test_the_table_names_every_part_and_speaks_of_nothing_that_does_not_fit(capsys):
    assert main(["plan", TWO_NODES]) == 0
    shown = capsys.readouterr().out
    for part in (
        "30,532,122,624 parameters",
        "optimizer",
        "KV cache",
        "pipeline bubble",
        "weights sent",
        "routes",
        "sync",
    ):
        assert part in shown
    assert "does not fit" not in shown


def test_what_does_not_fit_ends_with_1_and_the_nearest_layout_does_fit(capsys):
    asked = [TWO_NODES, "trainer.offload_optimizer=false", "trainer.recompute=none"]
    code, plan = planned(capsys, *asked)
    assert (code, plan["fits"]) == (1, False)
    assert "GiB of the h100's 79.1" in plan["reasons"][0]
    proposal = plan["proposal"]
    assert proposal["plan"]["fits"]
    assert proposal["plan"]["nodes"] == 2  # more machines are the last resort
    code, again = planned(capsys, *asked, *proposal["overrides"])
    assert code == 0
    assert again["trainer_bytes"] == proposal["plan"]["trainer_bytes"]


def test_more_machines_are_proposed_where_nothing_else_helps(capsys):
    asked = [ONE_NODE, "cluster.gpus_per_node=4", "parallel={ranks: 2, expert: 2}"]
    code, plan = planned(capsys, *asked)
    assert code == 1
    assert plan["proposal"]["plan"]["nodes"] > 1
    assert planned(capsys, *asked, *plan["proposal"]["overrides"])[0] == 0


def test_a_model_that_no_node_holds_is_proposed_a_server_over_several(capsys):
    code, plan = planned(capsys, "configs/kimi-k2/gspo.yaml", "--gpu", "h100")
    assert code == 1
    assert any("less than one sequence of 9,216" in reason for reason in plan["reasons"])
    assert "server.tensor_parallel=32" in plan["proposal"]["overrides"]
    assert plan["proposal"]["plan"]["fits"]


def test_as_many_servers_are_planned_as_are_configured(capsys):
    _, four = planned(capsys, TWO_NODES)
    _, two = planned(capsys, TWO_NODES, "server.replicas=2")
    assert (four["servers"], two["servers"]) == (4, 2)
    assert two["seconds"]["rollout"] > four["seconds"]["rollout"]
    code, nine = planned(capsys, TWO_NODES, "server.replicas=9")
    assert code == 1
    assert "leave 8, and 9 servers take 2 each" in nine["reasons"][0]


def test_nodes_scale_the_trainer_with_them_and_the_gpu_can_be_another(capsys):
    _, two = planned(capsys, TWO_NODES)
    _, four = planned(capsys, TWO_NODES, "--nodes", "4")
    assert (four["nodes"], four["trainer_ranks"], four["servers"]) == (4, 16, 2 * two["servers"])
    assert four["trainer_bytes"]["host"] == pytest.approx(two["trainer_bytes"]["host"] / 2)
    _, other = planned(capsys, TWO_NODES, "--gpu", "h200")
    assert other["server"]["cache_tokens"] > two["server"]["cache_tokens"]
    assert other["seconds"]["rollout"] < two["seconds"]["rollout"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "there is no config file"),
        ([TWO_NODES, "--nodes", "0"], "a number of machines"),
        ([TWO_NODES, "parallel.tensor=8"], "do not divide"),
        (["configs/parts/cluster.yaml"], "model"),
    ],
)
def test_a_configuration_that_is_wrong_ends_with_2_and_a_sentence(capsys, arguments, message):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_dense_model_and_one_made_on_the_spot_are_planned(capsys):
    code, plan = planned(capsys, "configs/quickstart.yaml")
    assert code == 0
    assert plan["parameters"]["total"] > plan["parameters"]["active"]
    code, plan = planned(capsys, "configs/quickstart.yaml", "model.tiny.experts=0", "replay=none")
    assert code == 0
    assert plan["parameters"]["total"] == plan["parameters"]["active"]


def test_one_mini_batch_spends_no_pass_on_log_probs_unless_something_reads_them(capsys):
    def seconds(*more):
        return planned(capsys, TWO_NODES, "train.mini_batches=1", *more)[1]["seconds"]["logprobs"]

    assert seconds() == 0
    assert seconds("replay=r2") > 0
    assert seconds("objective={preset: grpo, kl: {beta: 0.01, place: reward}}") > 0


def test_a_configuration_of_the_cpu_is_planned_without_gpus(capsys):
    assert main(["plan", "configs/quickstart.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "device: cpu, so there is no GPU to fit into" in " ".join(shown.split())
    assert "895,808 parameters" in shown
    assert "h100" not in shown
    assert "server" not in shown
    code, plan = planned(capsys, "configs/quickstart.yaml")
    assert (code, plan["gpu"]) == (0, None)
    assert not {"fits", "seconds", "server", "nodes"} & plan.keys()
    held = ("weights", "gradients", "optimizer", "reference_and_critic", "activations", "routes", "lm_head", "overhead")
    assert plan["trainer_bytes"]["total"] == pytest.approx(sum(plan["trainer_bytes"][name] for name in held))
    assert plan["trainer_bytes"]["weights"] == 4 * 895_808


def test_the_same_is_planned_on_gpus_where_a_gpu_is_named(capsys):
    code, plan = planned(capsys, "configs/quickstart.yaml", "--gpu", "h100")
    assert (code, plan["gpu"], plan["fits"]) == (0, "h100", True)


@pytest.mark.parametrize("mean", ["0", "-1", "nan", "inf", "long"])
def test_a_length_that_no_answer_has_is_refused(mean, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", TWO_NODES, f"--mean-response={mean}"])
    assert ended.value.code == 2
    assert "--mean-response" in capsys.readouterr().err
