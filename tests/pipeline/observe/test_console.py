import io

from pipeline.observe.console import Console, step_line

METRICS = {
    "step": 3,
    "reward/mean": 0.5,
    "mismatch/k3": 1.2e-9,
    "loss/clip_fraction": 0.031,
    "routing/replayed_fraction": 1.0,
    "response/length_mean": 6.25,
    "throughput/rollout_tokens_per_s": 1912.3,
    "throughput/train_tokens_per_s": 8120.0,
    "time/rollout_s": 0.42,
    "time/reward_s": 0.01,
    "time/train_s": 0.38,
    "time/sync_s": 0.05,
    "time/step_s": 0.86,
}


def test_a_step_is_one_line_with_everything_a_person_watches():
    assert step_line(METRICS, 120) == (
        "step   3/120  reward 0.500  mismatch k3 1.2e-09  clipped 3.1%  replayed 100.0%  length 6.2  "
        "rollout 1,912 tok/s  train 8,120 tok/s  seconds: rollout 0.42, reward 0.01, train 0.38, sync 0.05, step 0.86"
    )


def test_what_a_run_does_not_measure_is_left_out():
    assert step_line({"step": 1, "reward/mean": 1.0}, 5) == "step 1/5  reward 1.000"


def test_without_a_terminal_there_are_plain_lines_and_no_bar():
    file = io.StringIO()
    with Console(120, file) as console:
        console.step(METRICS)
        console.say("[bold] stays as it is")
    assert file.getvalue() == step_line(METRICS, 120) + "\n[bold] stays as it is\n"


def test_supervised_steps_are_told_a_few_times_first_and_last_among_them():
    file = io.StringIO()
    with Console(1, file) as console:
        for number in range(1, 251):
            console.supervised(number, 250, 1.0 / number)
    lines = file.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "supervised   1/250  loss 1.000 nats/token"
    assert lines[-1] == "supervised 250/250  loss 0.004 nats/token"


def test_a_terminal_gets_the_same_line_and_a_bar(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")
    file = io.StringIO()
    with Console(120, file) as console:
        console.supervised(1, 2, 0.5)
        console.step(METRICS)
    shown = file.getvalue()
    assert step_line(METRICS, 120) in shown
    assert "3/120" in shown.replace(step_line(METRICS, 120), "")
