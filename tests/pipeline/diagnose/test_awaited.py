"""From the stacks of all, the one that everybody waits for."""

from __future__ import annotations

from pipeline.cluster.stacks import Frame, ProcessStacks, Thread
from pipeline.diagnose import stall
from pipeline.diagnose.awaited import Seen, sentence
from tests.support.fake_servers import Server, fleet_of

RANK = Frame("TrainerRank.update_policy", "/x/pipeline/trainer/rank.py", 120)
REDUCE = (
    Frame("install.<locals>.timed_wait", "/x/megatron_ext/collective_clock.py", 40),
    Frame("all_reduce", "/x/torch/distributed/distributed_c10d.py", 2800),
    Frame("_logger.<locals>.wrapper", "/x/torch/distributed/c10d_logger.py", 83),
)
GATHER = (Frame("all_gather_into_tensor", "/x/torch/distributed/distributed_c10d.py", 3900),)
SLEEP = (Frame("tokenize_slowly", "/x/mine.py", 7),)
LOOP = Frame("Scheduler.event_loop_normal", "/x/sglang/srt/managers/scheduler.py", 900)


def process(*frames, state="sleeping", **settings):
    return ProcessStacks(
        7, state, "python", (Thread("main", (Frame("run", "/x/ray.py", 1),)), Thread("", frames)), **settings
    )


def ranks(*stacks):
    return [
        Seen(f"trainer rank {i}", (process(*frames, RANK) if frames else process(),)) for i, frames in enumerate(stacks)
    ]


def test_a_rank_that_sleeps_is_named_among_those_that_wait_in_a_collective():
    assert sentence(ranks(REDUCE, SLEEP, REDUCE)) == (
        "everybody waits for trainer rank 1, which is in tokenize_slowly (x/mine.py:7), while 2 other ranks wait in a "
        "collective"
    )


def test_a_process_that_was_stopped_is_named_whatever_the_others_do():
    stopped = Seen("server 0", (process(Frame("forward", "/x/model.py", 3), LOOP, state="stopped"),), in_flight=3)
    words = sentence([*ranks((), ()), stopped])
    assert words == "everybody waits for server 0, whose process 7 was stopped (SIGSTOP) in forward (x/model.py:3)"


def test_ranks_in_different_collectives_are_named_with_them():
    assert sentence(ranks(REDUCE, GATHER)) == (
        "ranks wait in different collectives: trainer rank 0 in all_reduce; trainer rank 1 in all_gather_into_tensor"
    )


def test_a_rank_that_takes_no_part_in_a_collective_is_named():
    assert (
        sentence(ranks(REDUCE, ())) == "trainer rank 0 wait in all_reduce, which trainer rank 1 does not take part in"
    )


def test_all_ranks_in_one_collective_wait_for_their_network():
    assert sentence(ranks(REDUCE, REDUCE)).startswith("all ranks wait in all_reduce: the network between them")


def test_on_gpus_the_one_that_is_elsewhere_is_named():
    item, data = Frame("clip_grad_norm", "/x/clip.py", 3), Frame("read_rows", "/x/rows.py", 9)
    assert sentence(ranks((item,), (item,), (data,))).startswith(
        "everybody waits for trainer rank 2, which is in read_rows"
    )


def test_a_scheduler_that_hangs_is_named_by_its_line_while_the_ranks_are_idle():
    wedged = Seen("server 1", (process(Frame("grammar", "/x/g.py", 5), LOOP),), in_flight=4)
    assert sentence([*ranks((), ()), Seen("server 0", (process(LOOP),)), wedged]) == (
        "the run waits for server 1, which has 4 requests in flight; its scheduler is in grammar (x/g.py:5)"
    )


def test_a_run_in_which_nobody_works_waits_for_the_controller():
    assert "the controller itself" in sentence(ranks(()))


def test_the_file_has_the_sentence_all_stacks_and_a_number_that_is_not_taken(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(stall.StallReports, "_ranks", lambda self: ranks(REDUCE, SLEEP))
    reports = stall.StallReports(tmp_path, (), fleet_of(Server("a")), said.append)
    reports("update_policy", 61.2)
    reports("update_policy", 90)
    first, second = sorted((tmp_path / "stalls").iterdir())
    text = first.read_text()
    assert text.startswith("no progress in update_policy for 61 s: everybody waits for trainer rank 1")
    assert all(part in text for part in ("== server 0, http://a, 0 requests", "tokenize_slowly", "== controller"))
    assert "test_awaited.py" in text.partition("== controller")[2]
    assert said[0].endswith(f"(stacks: {first})")
    assert second.name == "stall_002.txt"
