"""What Ray tells a driver, but for the log of a raylet that died. (Which of its processes died: tests/chaos.)"""

from ray._private import worker

from pipeline.cluster.ray_processes import leave_out_the_raylets_log, what_died


def test_the_log_of_a_raylet_that_died_is_left_out_and_nothing_else(capsys, monkeypatch):
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    leave_out_the_raylets_log()
    for line in ("Raylet is terminated. Termination is unexpected.\n    many lines", "A worker died of memory"):
        worker.print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False, "ip": None}, ignore_prefix=False)
    said = capsys.readouterr().out
    assert "A worker died of memory" in said
    assert "Raylet is terminated" not in said


def test_without_ray_nothing_died():
    assert what_died() == ""
