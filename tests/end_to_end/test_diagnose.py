"""Faults planted in real engines, one at a time: each is named, and nothing else is."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import ray

from megatron_ext.exchange import _with_base
from pipeline.config import load_config
from pipeline.diagnose import diagnose
from pipeline.diagnose.bench import new_rollouts
from pipeline.diagnose.page import write_page
from pipeline.loop.check_engines import check_first_weights
from pipeline.loop.compare import DisagreementError
from pipeline.loop.open_loop import open_loop
from tests.support.proofs import sampled

pytestmark = pytest.mark.slow  # they share engines that take so long to start
SETTINGS = ["supervised.steps=60", "supervised.decay_steps=60", "supervised.batch_size=16", "train.decay_steps=null",
            "run.seed=1"]  # fmt: skip
ROLLOUTS = 48
STALE = "model.layers.2.mlp.experts.5.down_proj.weight"


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnose")
    (folder / "logs").mkdir()
    with open_loop(load_config("configs/quickstart.yaml", SETTINGS), folder, folder / "logs") as opened:
        yield opened


def on_ranks(loop, function) -> None:
    ray.get([rank.__ray_call__.remote(function) for rank in loop.trainers.ranks])


def set_on_policy(name, value):
    """Runs in a trainer rank."""
    return lambda rank: setattr(rank.trainer.policy, name, value)


def with_precision(**changes):
    """Runs in a trainer rank."""

    def change(rank):
        policy = rank.trainer.policy
        policy.precision = policy.precision.model_copy(update=changes)

    return change


def turn_positions(base):
    def turn(rank):
        for chunk in rank.trainer.policy.chunks:
            chunk.rotary_pos_emb = _with_base(chunk.rotary_pos_emb, base)

    return turn


def change_one_expert(rank):
    """The server's copy of it is stale from now on."""
    for name, parameter in rank.trainer.policy.chunks[0].named_parameters():
        if name.endswith("layers.2.mlp.experts.linear_fc2.weight5"):
            parameter.data.mul_(1.2)
            return
    raise AssertionError("there is no such expert")


def with_routes_of_others(rollouts):
    """Each rollout with the routes of another one of its length."""
    by_length = {}
    for i, rollout in enumerate(rollouts):
        by_length.setdefault(len(rollout.routes), []).append(i)
    out = list(rollouts)
    for alike in by_length.values():
        for mine, other in zip(alike, alike[1:] + alike[:1], strict=True):
            out[mine] = replace(rollouts[mine], routes=rollouts[other].routes)
    return out


IN_THE_TRAINER = {
    "temperature": (
        with_precision(temperature=0.7), with_precision(temperature=1.0), "at temperature 1 ",
        "give both the same",
    ),
    "LM head": (
        with_precision(head="bf16"), with_precision(head="fp32"), "LM head is fp32",
        "give both LM heads the same precision",
    ),
    "tokens and labels": (
        set_on_policy("label_shift", -1), set_on_policy("label_shift", 0), "label is the token one place later",
        "mend how labels are made",
    ),
    "rotary embedding": (
        turn_positions(2e6), turn_positions(1e4), "rope_theta is 10000", "give both the same rope_theta",
    ),
}  # fmt: skip


def test_healthy_engines_agree_and_no_part_is_named(engines):
    loop, model = engines
    found = diagnose(loop, model, new_rollouts(loop, ROLLOUTS))
    assert found.agree
    assert found.sentence.startswith("The engines agree: mean |log pi_o - log mu| is ")
    assert found.gap["abs_logprob"] < 1e-5
    assert found.findings == ()
    assert found.weights == ()
    assert found.not_measured == {"sampling mask": "the sampler kept all tokens"}
    assert len(found.parts) == 7
    assert sum(row["tokens"] for row in found.by_position) == found.tokens
    assert found.by_lag[0]["lag"] == 0
    assert np.all(np.array(found.by_layer) == 1.0)


@pytest.mark.parametrize("part", sampled(IN_THE_TRAINER, ["rotary embedding"]))  # the temperature is one of two below
def test_a_fault_in_the_trainer_is_named_with_what_mends_it(engines, part):
    loop, model = engines
    plant, mend, exchanged, change = IN_THE_TRAINER[part]
    rollouts = new_rollouts(loop, ROLLOUTS)
    on_ranks(loop, plant)
    try:
        found = diagnose(loop, model, rollouts)
    finally:
        on_ranks(loop, mend)
    assert not found.agree
    assert [trial.part for trial in found.findings] == [part]
    assert found.sentence.startswith("The engines disagree")
    assert f"The largest part is {part}: " in found.sentence
    assert exchanged in found.sentence
    assert change in found.sentence
    assert found.rest < 1e-5
    assert found.weights == ()
    assert diagnose(loop, model, rollouts, in_full=False).agree


def test_routes_of_another_sample_are_named(engines):
    loop, model = engines
    found = diagnose(loop, model, with_routes_of_others(new_rollouts(loop, ROLLOUTS)))
    assert [trial.part for trial in found.findings] == ["routing"]
    assert "not those of their tokens" in found.sentence
    assert found.rest < 1e-5
    assert min(found.by_layer) < 0.9


def test_log_probs_that_arrive_one_place_late_are_named(engines):
    loop, model = engines
    late = [replace(r, rollout_logprobs=np.roll(r.rollout_logprobs, 1)) for r in new_rollouts(loop, ROLLOUTS)]
    found = diagnose(loop, model, late)
    assert [trial.part for trial in found.findings] == ["tokens and labels"]
    assert "misaligned by one" in found.sentence


def test_a_mask_on_the_trainers_side_alone_is_named(engines):
    loop, model = engines
    rollouts = new_rollouts(loop, ROLLOUTS)
    rng = np.random.default_rng(0)
    masked = []
    for rollout in rollouts:
        others = np.stack([rng.permutation(np.delete(np.arange(64), token))[:20] for token in rollout.response_ids])
        masked.append(replace(rollout, kept=np.column_stack([rollout.response_ids, others]).astype(np.int32)))
    found = diagnose(loop, model, masked)
    assert [trial.part for trial in found.findings] == ["sampling mask"]
    assert "let both be over the same" in found.sentence
    assert found.rest < 1e-5


def test_a_mask_on_sampling_is_seen_though_log_probs_agree(engines):
    loop, model = engines
    masked = replace(loop)
    masked.sampling = replace(loop.sampling, top_k=2)
    found = diagnose(loop, model, new_rollouts(masked, 192))
    assert found.gap["abs_logprob"] < 1e-5
    assert not found.agree
    assert found.sentence.startswith("The server does not sample from the distribution")
    assert "top_k" in found.sentence


def test_two_faults_at_once_are_both_named(engines):
    loop, model = engines
    rollouts = with_routes_of_others(new_rollouts(loop, ROLLOUTS))
    on_ranks(loop, with_precision(temperature=0.7))
    try:
        found = diagnose(loop, model, rollouts)
    finally:
        on_ranks(loop, with_precision(temperature=1.0))
    assert {trial.part for trial in found.findings} == {"temperature", "routing"}
    assert found.rest < 1e-5


def test_rollouts_of_older_weights_are_named_by_their_lag(engines):
    loop, model = engines
    old = new_rollouts(loop, ROLLOUTS)
    on_ranks(loop, change_one_expert)
    loop.sync()
    found = diagnose(loop, model, old)
    assert [trial.part for trial in found.findings] == ["sampling"]
    assert "sampled under older weights" in found.sentence
    assert [row["lag"] for row in found.by_lag] == [1]
    assert found.weights == ()


def test_stale_weights_of_one_expert_are_named_by_the_tensor_and_mended_by_sending_them(engines, tmp_path, monkeypatch):
    loop, model = engines
    on_ranks(loop, change_one_expert)
    monkeypatch.setattr(type(loop.fleet), "version", 0)  # as before the first transfer
    with pytest.raises(DisagreementError, match=rf"the model that the trainer holds: {STALE} \(differs at http\S+\)$"):
        check_first_weights(loop)
    monkeypatch.undo()
    found = diagnose(loop, model, new_rollouts(loop, ROLLOUTS))
    assert not found.agree
    assert found.weights == (f"{STALE} (differs)",)
    assert found.sentence.startswith(f"The engines hold different weights: {STALE} (differs); ")
    assert [trial.part for trial in found.findings] == ["weights"]
    assert found.rest < 1e-5
    assert diagnose(loop, model, new_rollouts(loop, ROLLOUTS)).agree

    found.write_json(tmp_path / "diagnose.json")
    read = json.loads((tmp_path / "diagnose.json").read_text())
    assert read["sentence"] == found.sentence
    assert [trial["part"] for trial in read["parts"]] == [trial.part for trial in found.parts]
    write_page(found, tmp_path / "diagnose.html", name="stale")
    assert STALE in (tmp_path / "diagnose.html").read_text()
