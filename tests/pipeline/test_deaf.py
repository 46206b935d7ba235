"""Signals to every process of a job reach the run, and not the engines that it has started."""

import signal
import subprocess
import sys
import threading

import pytest

from pipeline.deaf import ASKING, deaf_children

WAITS = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


@pytest.mark.parametrize("number", ASKING)
def test_a_child_that_is_started_inside_does_not_hear_them_and_one_outside_does(number):
    with deaf_children():
        deaf = subprocess.Popen(WAITS, stdout=subprocess.PIPE)
    hears = subprocess.Popen(WAITS, stdout=subprocess.PIPE)
    try:
        for child in (deaf, hears):
            assert child.stdout is not None
            child.stdout.readline()
            child.send_signal(number)
        assert hears.wait(10) == -number
        with pytest.raises(subprocess.TimeoutExpired):
            deaf.wait(0.3)
    finally:
        deaf.kill()
        hears.kill()
    assert deaf.wait(10) == -signal.SIGKILL


def test_one_that_comes_meanwhile_is_received_at_the_end():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    try:
        with deaf_children():
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            assert heard == []
        assert heard == [1]
    finally:
        signal.signal(signal.SIGUSR1, before)
