"""The figure of a run is drawn of what a run writes, before its last evaluation too."""

from __future__ import annotations

import json

from scripts.language_figure import draw


def test_runs_are_drawn_from_their_files(tmp_path):
    whole, begun = tmp_path / "language-0", tmp_path / "language-1"
    for run, steps, evaluations in ((whole, 6, 2), (begun, 2, 1)):
        run.mkdir()
        metrics = [json.dumps({"step": n, "reward/mean": n / 10}) for n in range(1, steps + 1)]
        (run / "metrics.jsonl").write_text("\n".join(metrics) + "\n")
        scores = [json.dumps({"scores": {"reward": [0.3 + n / 2, 0.2, 0.9]}}) for n in range(evaluations)]
        (run / "evaluations.jsonl").write_text("\n".join(scores) + "\n")
    draw([whole, begun], tmp_path)
    both = (tmp_path / "language.png").read_bytes()
    draw([whole], tmp_path)
    assert both[:4] == b"\x89PNG"
    assert (tmp_path / "language.png").read_bytes() != both
