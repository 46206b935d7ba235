"""What engines that take turns cannot do is refused by name."""

from __future__ import annotations

import re

import pytest

from pipeline.config import ConfigError, load_config


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["rollout.max_staleness=1"], "rollout.max_staleness=1 samples while the trainer works; set it to 0"),
        (["rollout.interrupt=in_place"], "rollout.interrupt=in_place keeps answers in the servers' memory"),
        (["rollout.interrupt=retract"], "set it to abort or drain"),
        (["cluster.nodes=2"], "cluster.nodes=2, cluster.address=None ask for a cluster"),
        (["cluster.address=auto"], "set cluster.nodes=1 and cluster.address=null"),
        (["weights.transport=distributed"], "set weights.transport=shared_memory, or cluster.colocated=false"),
    ],
)
def test_it_is_refused_and_allowed_without(settings, named):
    correction = ["objective.correction=none"]
    with pytest.raises(ConfigError, match=re.escape(named)) as refused:
        load_config("configs/quickstart.yaml", ["cluster.colocated=true", *settings, *correction])
    assert "cluster.colocated" in str(refused.value)
    load_config("configs/quickstart.yaml", [*settings, *correction])


def test_servers_may_have_every_gpu():
    shared = load_config("configs/quickstart.yaml", ["cluster={colocated: true, gpus_per_node: 8}", "parallel.ranks=8"])
    assert shared.rollout_gpus == 8
