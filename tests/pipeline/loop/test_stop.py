"""A first signal asks, a second one and the end of the grace period end the run."""

import os
import signal
import time

import pytest

from pipeline.deaf import ASKING
from pipeline.loop.stop import StopRequest


@pytest.fixture(autouse=True)
def handlers():
    before = [signal.getsignal(number) for number in ASKING]
    yield
    for number, handler in zip(ASKING, before, strict=True):
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize("number", ASKING)
def test_a_first_signal_asks_and_a_second_ends(number, capfd):
    stop = StopRequest(grace_s=100)
    stop.listen()
    with stop.saving():
        stop.arm()
        send(number)
        assert stop.requested
        assert stop.signal_name == number.name
        assert (
            f"{number.name}: finishing the step, then saving a checkpoint, in 100 s at most" in capfd.readouterr().err
        )
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)
    assert stop.at_once


def wait_for_the_end(stop: StopRequest, *, armed: bool = True) -> None:
    with stop.saving():
        if armed:
            stop.arm()
        send(signal.SIGUSR1)
        time.sleep(60)


def test_the_end_of_the_grace_period_ends_the_run():
    stop = StopRequest(grace_s=0.1)
    stop.listen()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        wait_for_the_end(stop)
    assert stop.signal_name == "SIGUSR1"
    assert 0.1 < time.monotonic() - began < 30


@pytest.mark.parametrize(("grace_s", "armed"), [(None, True), (100, False)])
def test_a_signal_ends_at_once_without_checkpoints_or_before_the_first_step(grace_s, armed):
    stop = StopRequest(grace_s)
    stop.listen()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        wait_for_the_end(stop, armed=armed)
    assert time.monotonic() - began < 30


def test_no_grace_period_outlives_the_run():
    stop = StopRequest(grace_s=0.2)
    stop.listen()
    with stop.saving():
        stop.arm()
        send(signal.SIGTERM)
    time.sleep(0.4)
