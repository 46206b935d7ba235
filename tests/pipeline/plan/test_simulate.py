"""The simulator against cases with a known answer, and against what no mode can do."""

import numpy as np
import pytest

from megatron_ext.hf.description import read_description
from pipeline.plan.hardware import GPUS
from pipeline.plan.sampling import Lengths, Sampling, generate, sample, server
from pipeline.plan.simulate import MODES, Phases, Workload, best, outcome, scaling

MODEL = read_description("configs/qwen3-30b-a3b")
PLACES = 256


def steady(batch, context):
    """A step that takes as long for one sequence as for many."""
    return 0.01


def workload(deviation=0.7, samples=1024, **settings):
    one = server(
        MODEL, GPUS["h100"], tp=2, weight_bytes=2, cache_bytes=2, tokens_each=2000, longest=9216, most=PLACES
    )  # fmt: skip
    lengths = Lengths(2731, 8192, deviation)
    return Workload(MODEL, GPUS["h100"], one, lengths, 512, samples, quantum=4, **settings)


def test_with_steps_of_one_length_a_rollout_lasts_as_long_as_its_longest_answer():
    lengths = np.array([3.0, 9.0, 5.0, 7.0])
    run = generate(lengths, PLACES, steady, prompt=10)
    assert run.seconds == pytest.approx(0.01 * 9)
    assert 1 - run.busy == pytest.approx(1 - lengths.mean() / lengths.max())


@pytest.mark.parametrize("answers", [8, 64])
def test_the_idle_share_of_exponential_lengths_is_that_of_their_expected_maximum(answers):
    """E[max] of n exponentials is their mean times H_n, the n-th harmonic number, so 1 - 1/H_n of the places idle."""
    random = np.random.default_rng(0)
    runs = [generate(random.exponential(1000, answers), answers, steady, prompt=0) for _ in range(2000)]
    seconds, used = sum(run.seconds for run in runs), sum(run.seconds * run.busy for run in runs)
    harmonic = sum(1 / i for i in range(1, answers + 1))
    assert 1 - used / seconds == pytest.approx(1 - 1 / harmonic, abs=0.01)


def test_a_place_that_is_free_takes_the_next_answer():
    # two places: 4 and 1 begin, 2 follows the 1, then 3 the 2: one place ends at 4, the other at 6
    run = generate([4, 1, 2, 3], 2, steady, prompt=0)
    assert run.seconds == pytest.approx(0.06)
    assert run.busy == pytest.approx(10 / 12)


def test_the_time_of_a_run_is_the_sum_of_its_steps():
    """Against one step after another: the context of a sequence is its prompt and what it has so far."""
    lengths, prompt = [5, 2, 7, 7, 1, 3], 11

    def cost(batch, context):
        return 1.0 + 0.1 * batch + 0.01 * batch * context

    waiting, running, seconds = list(lengths), [], 0.0
    while waiting or running:
        while waiting and len(running) < 3:
            running.append([waiting.pop(0), 0])
        seconds += 1.0 + 0.1 * len(running) + 0.01 * sum(prompt + done + 0.5 for _, done in running)
        running = [[n, done + 1] for n, done in running if done + 1 < n]
    assert generate(lengths, 3, cost, prompt).seconds == pytest.approx(seconds)


def test_a_synchronous_loop_waits_with_one_task_for_the_other():
    phases = Phases(Sampling(rollout=10, busy=0.5, steady=5, full=4), train=6, sync=0)
    modes = {mode: outcome(mode, phases, 3, 1) for mode in MODES}
    assert [modes[mode].seconds for mode in MODES] == [16, 10, 6]
    # three GPUs train for 6 s, one samples with half of its places for 10 s, or with all for 5
    assert [modes[mode].idle for mode in MODES] == pytest.approx([1 - 23 / 64, 1 - 23 / 40, 1 - 23 / 24])


def test_no_mode_is_faster_than_its_slower_task_at_full_places_and_each_is_faster_than_the_one_before():
    one = workload()
    for trainer, rollout in ((4, 4), (8, 8), (16, 48), (256, 768)):
        phases = one.phases(trainer, rollout)
        seconds = [outcome(mode, phases, trainer, rollout).seconds for mode in MODES]
        assert seconds == sorted(seconds, reverse=True)
        assert min(seconds) >= phases.bound
        assert phases.sampling.full <= phases.sampling.steady <= phases.sampling.rollout
        assert all(0 <= outcome(mode, phases, trainer, rollout).idle < 1 for mode in MODES)


def test_a_longer_tail_leaves_more_idle_where_a_step_waits_for_it_and_only_there():
    idle = {mode: [] for mode in MODES}
    for deviation in (0.0, 0.3, 0.6, 0.9):
        phases = workload(deviation).phases(8, 8)
        assert (deviation > 0) == (phases.sampling.busy < 0.99)
        for mode in MODES:
            idle[mode].append(outcome(mode, phases, 8, 8).idle)
    assert idle["synchronous"] == sorted(idle["synchronous"])
    assert idle["one step off"] == sorted(idle["one step off"])
    assert np.ptp(idle["asynchronous"]) < 0.1 < np.ptp(idle["one step off"])


def test_more_gpus_are_never_slower_and_with_more_answers_a_step_takes_no_longer():
    sizes = [8, 32, 128]
    strong = scaling(workload(samples=512), sizes, weak=False)
    weak = scaling(workload(samples=64), sizes, weak=True)
    for mode in MODES:
        speeds = [strong[n][mode].steps_s for n in sizes]
        assert speeds == sorted(speeds)
        assert speeds[-1] < 16 * speeds[0]
        assert weak[128][mode].seconds < 1.2 * weak[8][mode].seconds


def test_the_same_seed_gives_the_same_lengths_and_none_is_longer_than_the_longest():
    lengths = Lengths(1000, 2000, 1.0)
    assert np.array_equal(lengths.sample(500, 3), lengths.sample(500, 3))
    assert not np.array_equal(lengths.sample(500, 3), lengths.sample(500, 4))
    assert lengths.sample(5000, 0).max() == 2000
    assert Lengths(1000, 10**9, 0.5).sample(200_000, 0).mean() == pytest.approx(1000, rel=0.01)
    assert set(Lengths(1000, 2000, 0.0).sample(5, 0)) == {1000.0}


def test_servers_that_are_followed_stand_for_all():
    one = workload()
    answers = one.lengths.sample(2400, 0)
    found = sample(answers, 100, one.server, one.prompt)
    runs = [generate(answers[i::100], PLACES, one.server.step_s, one.prompt) for i in range(100)]
    prefill = 24 * one.server.prefill_s(one.prompt)
    assert found.rollout == pytest.approx(max(run.seconds for run in runs) + prefill)
    exact = np.mean([run.busy * run.seconds for run in runs]) / max(run.seconds for run in runs)
    assert found.busy == pytest.approx(exact, rel=0.1)


def test_too_few_gpus_are_refused():
    with pytest.raises(ValueError, match="do not hold a trainer of 4 and a server of 2"):
        best(workload(), 4)
    with pytest.raises(ValueError, match="too few"):
        workload().phases(4, 1)
