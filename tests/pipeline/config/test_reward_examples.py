"""Every example of docs/rewards.md is a configuration as it is written, and every kind has one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.config.rewards import KINDS

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")


def examples():
    blocks = re.findall(r"(?m)^    base: .*\n(?:    .*\n|\n(?=    ))*", PAGE)
    return ["\n".join(line[4:] for line in block.splitlines()) + "\n" for block in blocks]


def load(text, folder):
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return load_config(folder / "run.yaml")


@pytest.mark.parametrize("text", examples())
def test_an_example_loads(text, tmp_path):
    assert load(text, tmp_path).rewards


def test_every_kind_has_a_complete_example(tmp_path):
    shown = set()
    for number, text in enumerate(examples()):
        (tmp_path / str(number)).mkdir()
        shown |= {reward.kind for reward in load(text, tmp_path / str(number)).rewards}
    assert shown == KINDS.keys()
