"""200 conversations that an unchanged client leads, half of them in streams, with the tokenizer and the template of a
real language model, over weight updates and the death of a server: what the servers received, by their own logs, is
what is trained on, token by token."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch

from pipeline.arrays import padded
from pipeline.data.tokenizer import load_tokenizer
from pipeline.dumps.dump import dump_path, read_dump
from pipeline.loop.update import Measured, loss_rows
from pipeline.objectives import Denominators, LossInputs, ObjectiveConfig, resolve
from pipeline.step import PolicyTokens
from pipeline.types import Rollout
from tests.support.command import SMALL, Command
from tests.support.smollm2 import write_model
from tests.support.talks import TURNS, in_streams, settings, split, write_questions

pytestmark = [pytest.mark.slow, pytest.mark.proof]

STEPS, PROMPTS, SAMPLES = 5, 10, 4
CONVERSATIONS = STEPS * PROMPTS * SAMPLES
RUN = [
    *SMALL, "supervised.steps=0", f"train.steps={STEPS}", "train.lr=2e-3", "rollout.max_staleness=3",
    "objective={preset: grpo, credit: turn, correction: {kind: token_tis}}",
    f"rollout.prompts_per_step={PROMPTS}", f"rollout.samples_per_prompt={SAMPLES}", "server.replicas=2",
    "server.probe_timeout_s=4", "debug.dump_rollouts=true", "checks.first_rollouts=0",
]  # fmt: skip


def first_server(run: Command) -> int:
    """The process of one server of a run that was started first."""
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda f: int(f.name)):
        with contextlib.suppress(OSError):
            variables = (folder / "environ").read_bytes().decode(errors="replace")
            if run.mark in variables and "SAMEROUTE_SERVER_TOKEN=" in variables:
                return int(folder.name)
    raise AssertionError("no server runs")


def received_ids(folder: Path) -> list[tuple[int, ...]]:
    """Of every request that a server logged."""
    found: list[tuple[int, ...]] = []
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            event = json.loads(line[line.index("{") :])
            if event["event"] == "request.received" and (ids := event["obj"].get("input_ids")):
                found.extend(map(tuple, ids if isinstance(ids[0], list) else [ids]))
    return found


def of_prompt(rollouts: Iterable[Rollout]) -> dict[tuple[int, ...], list[tuple[int, ...]]]:
    """Whole sequences by their prompt."""
    found = defaultdict(list)
    for rollout in rollouts:
        found[tuple(rollout.prompt_ids.tolist())].append(tuple(rollout.token_ids.tolist()))
    return found


def differences(received: Sequence[tuple[int, ...]], rollouts: Sequence[Rollout]) -> list[str]:
    """Turns whose beginning no server received, and requests that no conversation of their prompt begins with."""
    wrong, known = [], set(received)
    for rollout in rollouts:
        before = len(rollout.prompt_ids)
        for turn in range(rollout.turns):
            start = before + int(np.flatnonzero(rollout.turn_numbers == turn)[0])
            if tuple(rollout.token_ids[:start].tolist()) not in known:
                wrong.append(f"turn {turn} of a conversation was sampled after other tokens")
    for prompt, wholes in of_prompt(rollouts).items():
        own = [ids for ids in known if ids[: len(prompt)] == prompt]
        wrong += [
            "a server was sent what no conversation begins with"
            for ids in own
            if not any(w[: len(ids)] == ids for w in wholes)
        ]
    return wrong


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("over_http")
    questions, logged = write_questions(folder, 200), folder / "requests"
    logged.mkdir()
    log = ["--log-requests", "--log-requests-level=3", "--log-requests-format=json", f"--log-requests-target={logged}"]
    model = write_model(folder / "smollm2")
    own = settings(questions, "OverHTTP", prompt_tokens=64, tokens=180, context=256)
    run = Command(folder, *RUN, *own, f"model={{tiny: null, path: {model}}}", f"server.extra_args={json.dumps(log)}")
    try:
        run.wait_for(f"step 1/{STEPS}")
        os.kill(first_server(run), signal.SIGKILL)
        assert run.end(300) == 0, run.text()
        assert run.own_orphans() == []
    finally:
        run.stop()
    batches = [read_dump(dump_path(run.run / "dumps", step)).batch for step in range(1, STEPS + 1)]
    rows = [
        row
        for part in sorted((run.run / "episodes").glob("part_*.parquet"))
        for row in pyarrow.parquet.read_table(part).to_pylist()
    ]
    metrics = [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(
        batches=batches,
        rollouts=[rollout for batch in batches for rollout in batch.rollouts],
        rows=[row for row in rows if row["step"] is not None],
        metrics=metrics,
        received=received_ids(logged),
        tokenizer=load_tokenizer(model),
    )


def test_a_server_died_and_conversations_went_on_under_new_weights(finished):
    assert len(finished.rollouts) == CONVERSATIONS
    assert finished.metrics[-1]["servers/lost"] == 1
    versions = [set(r.weight_versions[r.trained].tolist()) for r in finished.rollouts]
    sampled = set().union(*versions)
    assert max(sampled) - min(sampled) >= 3  # updates while they went on
    assert sum(len(v) > 1 for v in versions) > CONVERSATIONS / 10
    assert sum(len(row["servers"]) > 1 for row in finished.rows) > 0
    streams = [r for batch in finished.batches for g in batch.groups if in_streams(g.prompt) for r in g.rollouts]
    assert len(streams) > CONVERSATIONS / 3
    assert sum(len(set(r.weight_versions[r.trained].tolist())) > 1 for r in streams) > 0
    told = [row["endpoint/disconnects"] for row in finished.metrics if "endpoint/disconnects" in row]
    assert told  # in each step in which a conversation ended
    assert sum(told) == 0
    wrong = [v for row in finished.metrics for k, v in row.items() if "endpoint/branches" in k or "streams_lost" in k]
    assert sum(wrong) == 0


def test_what_the_servers_received_is_what_is_trained_on(finished):
    assert all(r.turns == TURNS for r in finished.rollouts)
    assert len(finished.received) >= CONVERSATIONS * TURNS
    assert differences(finished.received, finished.rollouts) == []


def test_one_turn_that_is_made_again_from_its_text_is_found(finished):
    """What must not happen, done to one conversation: the comparison above then finds it."""
    found = 0
    for i, rollout in enumerate(finished.rollouts[:20]):
        turn = rollout.turn_numbers == 2
        text = finished.tokenizer.decode(rollout.response_ids[turn].tolist(), skip_special_tokens=False)
        again = np.array(finished.tokenizer.encode(text, add_special_tokens=False), np.int32)
        if np.array_equal(again, rollout.response_ids[turn]):
            continue
        (places,) = np.nonzero(turn)
        ids = np.concatenate([rollout.response_ids[: places[0]], again, rollout.response_ids[places[-1] + 1 :]])
        more = len(again) - len(places)
        trained = np.concatenate(
            [rollout.trained[: places[0]], np.ones(len(again), bool), rollout.trained[places[-1] + 1 :]]
        )
        remade = Rollout(
            rollout.prompt_ids, ids, np.zeros(len(rollout) + more, np.float32), None,
            np.where(trained, 0, -1).astype(np.int32), "stop", trained=trained,
        )  # fmt: skip
        others = [*finished.rollouts[:i], remade, *finished.rollouts[i + 1 :]]
        assert len(differences(finished.received, others)) >= 2
        found += 1
    assert found > 0


def test_each_sampled_token_is_trained_on_once(finished):
    """The client was told of as many tokens as there are, each conversation is in one step, and no step has others."""
    answers = [(row["prompt"], row["sample"]) for row in finished.rows]
    assert len(answers) == len(set(answers)) == CONVERSATIONS
    assert [row["trained_tokens"] for row in finished.rows] == [int(row["note"]) for row in finished.rows]
    assert sum(row["trained_tokens"] for row in finished.rows) == sum(r.trained_tokens for r in finished.rollouts)
    assert all(len(row["turn_rewards"]) == row["turns"] == TURNS for row in finished.rows)


def test_a_conversation_begins_with_what_the_models_own_template_writes(finished):
    text = finished.tokenizer.decode(finished.rollouts[0].token_ids.tolist())
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")  # nobody has said that
    assert text.count("<|im_start|>tool\n") == TURNS - 1
    assert len(finished.tokenizer) == 49152


def noise(places: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1 that belong to a place in a conversation."""
    return np.sin((places + 1) * 12.9898) * 43758.5453 % 1


def test_the_loss_and_its_gradient_are_those_of_each_turn_as_a_single_answer(finished):
    """Of the same ids: what stands before a turn is then its prompt, and only the turn has a mask."""
    objective = resolve(
        ObjectiveConfig(preset="grpo", credit="turn", reduction="token_mean", correction={"kind": "token_tis"})
    )
    batch = finished.batches[0]
    places = [np.arange(len(r)) for r in batch.rollouts]
    current = [r.rollout_logprobs - 0.1 * noise(p) for r, p in zip(batch.rollouts, places, strict=True)]
    proximal = PolicyTokens([np.float32(r.rollout_logprobs) for r in batch.rollouts], [], np.zeros((0, 3), np.int64))
    rows = loss_rows(objective, batch, Measured(proximal), max_new_tokens=180)
    tokens = sum(r.trained_tokens for r in batch.rollouts)

    def matrix(arrays):
        return torch.from_numpy(padded([np.asarray(a, np.float64) for a in arrays]))

    def learned(parts):
        """(loss, gradient by token) of (rollout, row, its place in the conversation)."""
        sampled, advantages = ([] for _ in range(2))
        policy = matrix([current[i][where] for i, _, where in parts]).requires_grad_()
        for i, rollout, where in parts:
            sampled.append(rollout.rollout_logprobs)
            advantages.append(np.broadcast_to(rows[i].advantage, len(batch.rollouts[i]))[where])
        mask = torch.from_numpy(padded([rollout.trained for _, rollout, _ in parts]))
        x = LossInputs(policy, matrix(sampled), matrix(sampled), matrix(advantages), mask, prompt_tokens=mask.sum(1))
        loss = objective.loss(x, Denominators(len(batch.rollouts), tokens, 180, prompts=PROMPTS)).loss
        (gradient,) = torch.autograd.grad(loss, policy)
        return float(loss.detach()), gradient.numpy()

    whole, by_token = learned([(i, r, slice(0, len(r))) for i, r in enumerate(batch.rollouts)])
    parts = [(i, alone, where) for i, r in enumerate(batch.rollouts) for alone, where in split(r)]
    apart, theirs = learned(parts)
    assert len(parts) == PROMPTS * SAMPLES * TURNS
    assert apart == pytest.approx(whole, rel=1e-9)
    assert np.abs(by_token).max() > 0
    for (i, _, where), gradient in zip(parts, theirs, strict=True):
        assert np.allclose(by_token[i][where], gradient[: where.stop - where.start], rtol=1e-9, atol=0)
    for i, rollout in enumerate(batch.rollouts):
        assert (by_token[i][: len(rollout)][~rollout.trained] == 0).all()
