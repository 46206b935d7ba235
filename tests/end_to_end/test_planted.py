"""Real engines of which one sleeps: the run names it, and nobody else, on its console, in its metrics, in its report.
Then a gradient spikes, and at last a weight is NaN.

One run of two trainer ranks and two servers, in which faults come and go (`support.planted`). All that is slow is so by
a multiple of what the same calls took before. A busy machine makes a rank slow now and then: what is waited for is that
those are named, and no others, not that nobody else ever was.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from pipeline.dumps.dump import read_dump
from pipeline.observe.report import slowest
from pipeline.observe.report.page import write_report
from pipeline.observe.report.run_files import read_run
from pipeline.observe.stragglers import STEPS, WINDOW
from tests.support import planted
from tests.support.command import SMALL, Command

LIMIT_S = 120
NAMED = re.compile(
    r"((?:trainer rank|server) \d) is slow: (?:its own work with what it does )?(\w+)(?: phases)? takes it "
    r"(\d+\.\d) times as long",
    re.IGNORECASE,
)


class Watched:
    """A run in which faults are planted."""

    def __init__(self, command: Command, faults):
        self.command, self.faults = command, faults

    @contextlib.contextmanager
    def fault(self, **sleeps: float | str) -> Iterator[Told]:
        """sleeps: where, an underscore for a space, and how long, see `planted.fault`."""
        told = Told(self.command)
        with contextlib.ExitStack() as stack:
            for where, how in sleeps.items():
                stack.enter_context(planted.fault(self.faults, where.replace("_", " "), how))
            yield told


class Told:
    """What a run has said since."""

    def __init__(self, command: Command):
        self.command, self.begun = command, len(command.text())
        self.before = len(read_run(command.run).metrics)

    @property
    def console(self) -> str:
        return self.command.text()[self.begun :]

    @property
    def named(self) -> set[tuple[str, str]]:
        """(who, phase) on the console."""
        return {(who, phase) for who, phase, _ in NAMED.findall(self.console)}

    @property
    def rows(self):
        return read_run(self.command.run).metrics[self.before :]

    def until[T](self, found: Callable[[], T]) -> T:
        """The first that is true."""
        deadline = time.monotonic() + LIMIT_S
        while not (value := found()):
            assert self.command.process.poll() is None, self.command.text()
            assert time.monotonic() < deadline, f"{self.console}\n{self.report()}"
            time.sleep(0.2)
        return value

    def steps(self, count: int) -> None:
        """So many more are made."""
        self.until(lambda: len(self.rows) >= count)

    def row_naming(self, **who: int) -> Mapping[str, float]:
        """The last step's metrics where they name these; nothing where they do not."""
        return self.rows[-1] if all(self.rows[-1].get(f"straggler/{kind}") == n for kind, n in who.items()) else {}

    def report(self) -> dict[tuple[str, str], float]:
        """(who, phase) -> times, as the report's figure says it now."""
        (figure,) = slowest.figures(read_run(self.command.run))
        return {(who.lower(), phase): float(times) for who, phase, times in NAMED.findall(figure.now)}

    def until_named(self, *who: tuple[str, str]) -> dict[tuple[str, str], float]:
        """Until the report names these and no others."""
        return self.until(lambda: found if set(found := self.report()) == set(who) else {})


@pytest.fixture(scope="module")
def watched(preloaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    (folder / "faults").mkdir()
    settings = ["supervised.steps=0", "train.steps=9999", "debug.stall_s=2", "run.rollouts_shown=0",
                "rewards=tests.support.verifiers:share_of_evens", "train.skip_grad_norm_times=1000",
                "train.mini_batches=1"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(planted.FOLDER, str(folder / "faults"))
        command = Command(folder, *SMALL, *settings, "parallel={ranks: 2, expert: 2}", "server.replicas=2",
                          "weights={transport: distributed, senders: 2}")  # fmt: skip
    try:
        command.wait_for(f"step {WINDOW:>4}/9999")
        yield Watched(command, folder / "faults")
    finally:
        command.stop()


@pytest.mark.proof
def test_nobody_is_named_where_nobody_sleeps(watched):
    with watched.fault() as told:
        told.steps(WINDOW)
        told.until(lambda: not told.report() and not any("straggler" in name for name in told.rows[-1]))


@pytest.mark.proof
def test_a_rank_that_sleeps_a_little_in_each_step_and_a_server_that_does_are_named(watched):
    with watched.fault(trainer_rank_1_logprobs=8, server_1=4) as told:
        slow = ("trainer rank 1", "logprobs"), ("server 1", "sampling")
        told.until_named(*slow)
        assert set(slow) <= told.named
        row = told.until(lambda: told.row_naming(rank=1, server=1))
        assert row["straggler/rank_times"] > 4
        assert row["straggler/server_times"] > 2
        assert 0 < row["straggler/rank_lost_s"] < row["time/train_s"]
        assert 0 < row["straggler/server_lost_s"] < row["time/rollout_s"]
        page = write_report(watched.command.run).read_text()
        assert "Trainer rank 1 is slow: logprobs takes it" in page
        assert "Server 1 is slow: sampling takes it" in page


@pytest.mark.proof
def test_one_phase_that_is_twice_as_slow_on_one_rank_is_named_with_it_and_no_other_phase(watched):
    with watched.fault(trainer_rank_0_update=1) as told:
        found = told.until_named(("trainer rank 0", "update"))
        assert 1.5 <= found["trainer rank 0", "update"] < 3
        assert ("trainer rank 0", "update") in told.named
        told.until(lambda: told.row_naming(rank=0))
        assert len(told.rows) >= STEPS


@pytest.mark.proof
@pytest.mark.parametrize("phase", ["between", "sync"])
def test_one_that_is_late_between_its_phases_or_sends_its_weights_late_is_named_with_it(watched, phase):
    with watched.fault(**{f"trainer_rank_1_{phase}": 2}) as told:
        told.until_named(("trainer rank 1", phase))
        assert ("trainer rank 1", phase) in told.named
        row = told.until(lambda: told.row_naming(rank=1))
        assert 0 < row["straggler/rank_lost_s"] < row["time/train_s" if phase == "between" else "time/sync_s"]


@pytest.mark.proof
def test_one_that_sleeps_on_is_who_everybody_waits_for_with_its_line(watched):
    line = planted.hold.__code__.co_firstlineno
    for where, words in {
        "trainer_rank_1_update": "no progress in update_policy for .* everybody waits for trainer rank 1, which is in "
        r"hold \(tests/support/planted.py:(\d+)\), while 1 other rank waits in a collective",
        "server_1": "no progress in sampling for .* the run waits for server 1, which has .* requests in flight; "
        r"its scheduler is in hold \(tests/support/planted.py:(\d+)\)",
    }.items():
        with watched.fault(**{where: planted.HELD}) as told:
            found = told.until(lambda told=told, words=words: re.search(words, told.console))
            assert line < int(found[1]) <= line + 3
        told.steps(2)


@pytest.mark.proof
def test_a_gradient_that_spikes_makes_no_update_and_leaves_its_batch(watched):
    skipped = re.compile(r"step (\d+): an update was skipped, its gradient norm, .*, is above .*; its batch is (\S+)")
    with watched.fault() as told:
        told.steps(2)
        assert skipped.search(told.console) is None
    with watched.fault(trainer_rank_1_update=planted.SPIKE) as told:
        step, batch = told.until(lambda: skipped.search(told.console)).groups()
    assert read_dump(Path(batch)).batch.step == int(step)
    row = told.until(lambda: next((row for row in told.rows if row["step"] == int(step)), None))
    assert row["train/skipped_updates"] > 0
    told.until(lambda: told.rows[-1]["train/steps_skipped_in_a_row"] == 0)  # the next ones are made


@pytest.mark.proof
def test_a_number_of_an_expert_that_is_nan_is_named_before_a_server_samples(watched):
    """The last one: it ends the run. Rank 1 has the experts from 4 on."""
    with watched.fault(trainer_rank_1_update=planted.NAN) as told:
        watched.command.process.wait(LIMIT_S)
    assert watched.command.process.poll() == 1
    one = r"\(1 of [\d,]+ numbers\)"
    expert = rf"model\.layers\.1\.mlp\.experts\.7\.gate_proj\.weight {one}"
    assert re.search(
        rf"NotFiniteWeightsError: the trainer's weights are not finite: {expert}\. No server", told.console
    )
    own = rf"weights of trainer rank 1 are not finite: decoder\.layers\.1\.mlp\.experts\.linear_fc1\.weight7 {one}"
    (step,) = re.findall(rf"step (\d+): {own}", told.console)
    assert read_dump(watched.command.run / "dumps" / f"step_{int(step):06}.safetensors").batch.step == int(step)
    assert "started again" not in told.console  # as a server is that has died
    assert [row["step"] for row in read_run(watched.command.run).metrics if row["step"] >= int(step)] == []
