"""Before a run's first answers, what the servers have loaded is compared with the trainer's weights, name by name."""

from types import SimpleNamespace

import pytest

from pipeline.config import load_config
from pipeline.loop.check_engines import check_first_rollouts, check_first_weights
from pipeline.loop.compare import DisagreementError
from pipeline.observe.long_phase import LongPhases
from pipeline.weights import WeightDifference

SERVER = "http://127.0.0.1:1"


def loop_of(differences, *overrides, version=0, serves=True):
    """What the check asks of a loop, and how often it has compared."""
    asked = []
    trainers = SimpleNamespace(progress=lambda: None, weight_differences=lambda: asked.append(1) or differences)
    fleet = SimpleNamespace(serves=serves, version=version)
    config = load_config("configs/quickstart.yaml", list(overrides))
    return SimpleNamespace(config=config, trainers=trainers, fleet=fleet), asked


def test_a_tensor_that_the_server_never_reached_ends_the_run_by_its_name_before_an_answer_is_sampled(tmp_path):
    loop, _ = loop_of([WeightDifference("lm_head.weight", SERVER, "unreached")])
    # it has no source of prompts: were an answer sampled, AttributeError would be raised
    with pytest.raises(DisagreementError, match=rf"not hold the model .*: lm_head\.weight \(unreached at {SERVER}\)"):
        check_first_rollouts(loop, tmp_path, SimpleNamespace(path=tmp_path), None, LongPhases())


def test_of_many_tensors_ten_are_named():
    loop, _ = loop_of([WeightDifference(f"weight{i}", SERVER, "ignored") for i in range(12)])
    with pytest.raises(DisagreementError, match=r"weight9 \(ignored at \S+\) and 2 more$"):
        check_first_weights(loop)


@pytest.mark.parametrize(
    ("how", "overrides", "compared"),
    [
        ({}, [], 1),
        ({"version": 1}, [], 0),  # the transfer was compared
        ({"serves": False}, [], 0),
        ({}, ["weights.checksum_every=0"], 0),
    ],
)
def test_weights_that_agree_are_compared_once_and_only_where_no_transfer_was(how, overrides, compared):
    loop, asked = loop_of([], *overrides, **how)
    check_first_weights(loop)
    assert len(asked) == compared
