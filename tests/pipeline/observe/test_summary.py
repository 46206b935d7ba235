import json

import numpy as np
import pytest

from pipeline.observe.summary import read_metrics, running_mean, write_summary


def write(path, rewards, **changes):
    rows = [
        {"step": n + 1, "reward/mean": r, "mismatch/k3": 1e-12, "mismatch/abs_logprob": 1e-6, "response/length_mean": 6}
        | changes
        for n, r in enumerate(rewards)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pixels(metrics, png):
    from matplotlib.image import imread

    return imread(write_summary(metrics, png))


def test_the_picture_has_three_panels_and_shows_the_reward(tmp_path):
    flat = pixels(write(tmp_path / "flat.jsonl", [0.1] * 20), tmp_path / "flat.png")
    rising = pixels(write(tmp_path / "rising.jsonl", list(np.linspace(0, 1, 20))), tmp_path / "rising.png")
    assert flat.shape == rising.shape
    assert flat.shape[1] > 1000
    thirds = np.array_split(np.abs(flat - rising).max(-1) > 0.1, 3, axis=1)
    assert thirds[0].any()
    assert not thirds[2].any()
    assert all((third[..., :3].std() > 0.01) for third in np.array_split(rising, 3, axis=1))


def test_equal_engines_are_drawn_without_a_log_axis(tmp_path):
    metrics = write(tmp_path / "m.jsonl", [0.5] * 3, **{"mismatch/k3": 0.0, "mismatch/abs_logprob": 0.0})
    assert pixels(metrics, tmp_path / "m.png").std() > 0.01


def test_a_running_mean_looks_back_only():
    assert running_mean(np.array([1.0, 3.0, 5.0, 7.0]), 2).tolist() == [1, 2, 4, 6]


def test_a_missing_metric_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "reward/mean": 1}\n')
    with pytest.raises(ValueError, match="step 1 has no metric 'mismatch/abs_logprob'"):
        write_summary(path, tmp_path / "m.png")
    assert not (tmp_path / "m.png").exists()


def test_a_run_without_steps_and_a_broken_line_are_said_to_be_so(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no steps"):
        read_metrics(tmp_path / "empty.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_metrics(tmp_path / "broken.jsonl")
