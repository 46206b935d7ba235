"""Whose turn it is: in which order memory is given and taken, whoever asks."""

from __future__ import annotations

import threading

import pytest

from pipeline.cluster.colocation import Colocated


class Engines:
    """Both, as one list of what was asked of them."""

    def __init__(self):
        self.calls = []
        self.turns = Colocated(Trainer(self), Servers(self))

    def since(self):
        said, self.calls = self.calls, []
        return said


class Trainer:
    def __init__(self, engines):
        self.engines = engines

    def release_memory(self, parts):
        self.engines.calls += [f"trainer gives {part}" for part in parts]

    def resume_memory(self, parts):
        self.engines.calls += [f"trainer takes {part}" for part in parts]


class Servers(Trainer):
    def release_memory(self):
        self.engines.calls.append("servers give all")

    def resume_memory(self, part):
        self.engines.calls.append(f"servers take {part}")

    def send_again(self):
        with self.engines.turns.sending():
            self.engines.calls.append("sent again")


TO_TRAINER = ["servers give all", "trainer takes weights", "trainer takes optimizer"]
TO_SERVERS = ["trainer gives optimizer", "servers take weights", "sent", "trainer gives weights", "servers take cache"]


def transfer(engines):
    with engines.turns.sending():
        engines.calls.append("sent")


@pytest.fixture
def engines():
    return Engines()


def test_a_step_is_two_turns_and_both_hold_no_more_than_weights_in_between(engines):
    for _ in range(2):
        engines.turns.sampling()
        assert engines.since() == []
        engines.turns.training()
        engines.turns.training()
        assert engines.since() == TO_TRAINER
        transfer(engines)
        assert engines.since() == TO_SERVERS
    found = engines.turns.metrics()
    assert found["turns/count"] == 4
    assert found["time/turns_s"] > 0
    assert engines.turns.metrics() == {"turns/count": 0, "time/turns_s": 0}


def test_who_samples_after_the_trainer_without_a_transfer_has_the_weights_sent_again(engines):
    engines.turns.training()
    engines.since()
    engines.turns.sampling()
    assert engines.since() == [word.replace("sent", "sent again") for word in TO_SERVERS]
    engines.turns.sampling()
    assert engines.since() == []


def test_in_the_servers_turn_weights_are_read_and_sent_beside_their_caches(engines):
    transfer(engines)
    with engines.turns.reading():
        engines.calls.append("read")
    assert engines.since() == ["trainer takes weights", "sent", "trainer gives weights",
                               "trainer takes weights", "read", "trainer gives weights"]  # fmt: skip
    engines.turns.training()
    engines.since()
    with engines.turns.reading():
        assert engines.since() == []


def test_the_trainer_waits_for_a_transfer_that_another_thread_makes(engines):
    inside, end = threading.Event(), threading.Event()

    def send():
        with engines.turns.sending():
            inside.set()
            end.wait(10)
            engines.calls.append("sent")

    sender = threading.Thread(target=send)
    sender.start()
    assert inside.wait(10)
    trainer = threading.Thread(target=engines.turns.training)
    trainer.start()
    trainer.join(0.05)
    assert trainer.is_alive()
    end.set()
    sender.join(10)
    trainer.join(10)
    assert engines.since() == ["trainer takes weights", "sent", "trainer gives weights", *TO_TRAINER]
