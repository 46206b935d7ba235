"""What takes long says how far it is while it goes on, and what does not says nothing."""

import threading

import pytest

from pipeline.observe.long_phase import LongPhases

WAIT_S = 60  # for a line that comes within milliseconds


def heard(lines=1):
    """A listener, and an event that is set once it has heard so many lines."""
    said, enough = [], threading.Event()

    def say(line):
        said.append(line)
        if len(said) == lines:
            enough.set()

    return said, enough, say


def test_a_long_phase_says_again_and_again_how_far_it_is_and_when_it_is_over(tmp_path):
    said, enough, say = heard(lines=3)
    far = iter([None, (0.4, 1.6, "GB"), *[(3, 60, "passes")] * 1000])
    phases = LongPhases(say, tmp_path / "start.log", every_s=0.01)
    with phases.of("the trainer loads the model", lambda: next(far)):
        assert enough.wait(WAIT_S)
    assert said[0] == "the trainer loads the model: 0 s so far"
    assert said[1].startswith("the trainer loads the model: 0 s so far, 0.4 of 1.6 GB, about ")
    assert "3 of 60 passes, about " in said[2]
    assert said[-1].startswith("the trainer loads the model: done after ")
    (logged,) = (tmp_path / "start.log").read_text().splitlines()
    assert logged.endswith(said[-1])


def test_a_short_one_is_only_logged_and_one_that_fails_is_logged_too(tmp_path):
    said, _, say = heard()
    phases = LongPhases(say, tmp_path / "start.log", every_s=3600)
    with phases.of("the first transfer of the weights"):
        pass
    with pytest.raises(ValueError, match="lost"), phases.of("the model is written"):
        raise ValueError("lost")
    assert said == []
    first, second = (tmp_path / "start.log").read_text().splitlines()
    assert "the first transfer of the weights: done after 0." in first
    assert "the model is written: failed after 0." in second
