"""What a run's configuration makes of the rollouts beside its training, and what is left of them afterwards."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config import load_config
from pipeline.engine.sampling import Sampling
from pipeline.loop.asynchronous import asynchronous
from pipeline.objectives import resolve
from pipeline.rollout.admission import Admission
from pipeline.rollout.saved import Saved
from pipeline.types import Prompt
from tests.support.episodes import graded_group, plain_rollout

STALE = "rollout.max_staleness=3", "objective.correction={kind: geometric_tis}"


class Producer:
    """Makes its maker and starts nothing."""

    def __init__(self, make, watch):
        self.make, self.watch, self.looked = make, watch, []

    def __enter__(self):
        self.maker = self.make()
        return self

    def __exit__(self, *_):
        pass

    def check(self):
        self.looked.append("producer")


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr("pipeline.loop.asynchronous.Producer", Producer)


GRADING = SimpleNamespace(judge=lambda: "a judge")


def loop_of(*overrides, grading=GRADING):
    config = load_config("configs/quickstart.yaml", list(overrides))
    return SimpleNamespace(
        config=config,
        objective=resolve(config.objective),
        grading=grading,
        fleet=SimpleNamespace(version=5, check_alive=lambda: None),
        trainers=SimpleNamespace(watch=lambda: None, give_up=pytest.fail),
        source=SimpleNamespace(tokenizer="a tokenizer"),
        sampling=Sampling(4, 1.0),
        least_graded=2,
        producer=None,
        environments=None,
        teacher=None,
    )


def maker_of(*overrides, steps=4, saved=None):
    loop = loop_of(*STALE, *overrides)
    with asynchronous(loop, steps, saved):
        return loop.producer.maker


def test_groups_are_admitted_as_the_configuration_says_and_none_beyond_the_last_step():
    rule = maker_of("rollout.prompts_per_step=6", "rollout.ahead=2", "rollout.order=admission").admission
    assert (rule.groups, rule.staleness, rule.ahead, rule.order) == (6, 3, 2, "admission")
    assert (rule.version, rule.last) == (5, 8), "four steps train at versions 5, 6, 7 and 8"
    assert maker_of().admission.order == "finish"


def test_a_group_is_made_and_graded_as_the_configuration_says():
    recipe = maker_of(
        "grading.on_failure=drop_group",
        "rollout.prompts_per_step=6",
        "rollout.samples_per_prompt=3",
        "rollout.max_sampling_rounds=2",
        "rollout.group_limit_s=7",
        "checks.scored_rollouts=5",
    ).recipe
    assert (recipe.samples, recipe.on_failure, recipe.least, recipe.most_dropped) == (3, "drop_group", 2, 12)
    assert (recipe.scored, recipe.limit_s, recipe.sampling.max_new_tokens) == (5, 7, 4)


@pytest.mark.parametrize("dynamic", [True, False])
def test_groups_that_teach_nothing_are_replaced_where_the_objective_says_so(dynamic):
    informative = maker_of(f"objective.dynamic_sampling={str(dynamic).lower()}").recipe.informative
    if not dynamic:
        assert informative is None
    else:
        rollout, prompt = plain_rollout([1], -np.ones(1)), Prompt(np.zeros(1, np.int32), "")
        assert informative(graded_group(prompt, [rollout] * 2, [0, 1]))
        assert not informative(graded_group(prompt, [rollout] * 2, [1, 1]))


def test_what_a_checkpoint_has_of_rollouts_is_gone_on_with():
    before = Admission(2, 3, 2, version=5)
    before.admit(9)
    prompt = Prompt(np.zeros(1, np.int32), "", index=9)
    saved = Saved(before.state(), {}, {}, {9: (prompt, {})})
    maker = maker_of(saved=saved)
    assert maker.making[9].prompt is prompt
    assert list(maker.admission.open) == [9]


def test_a_trainer_s_wait_looks_at_the_producer_too_and_no_longer_when_that_has_ended():
    loop, looked = loop_of(*STALE), []
    loop.trainers.watch = others = lambda: looked.append("others")
    with asynchronous(loop, 4, None):
        producer = loop.producer
        loop.trainers.watch()
        assert (looked, producer.looked) == (["others"], ["producer"])
        assert producer.watch is loop.fleet.check_alive
    assert loop.producer is None
    assert loop.trainers.watch is others


@pytest.mark.parametrize("error", [ValueError("a mistake"), KeyboardInterrupt()])
def test_where_the_steps_fail_no_thread_waits_for_the_trainer_any_more(error):
    """One may be sending weights to a server that came back, and the producer waits for it."""
    loop, given_up = loop_of(*STALE), []
    loop.trainers.give_up = given_up.append
    with pytest.raises(type(error)), asynchronous(loop, 4, None):
        raise error
    assert given_up == [error]


@pytest.mark.parametrize(
    ("overrides", "steps", "grading"), [((), 4, "a grading"), (STALE, 0, "a grading"), (STALE, 4, None)]
)
def test_a_synchronous_run_one_without_steps_and_one_of_dumps_make_nothing(overrides, steps, grading):
    loop = loop_of(*overrides, grading=grading)
    with asynchronous(loop, steps, None):
        assert loop.producer is None
