"""Step (b2): the trainer on Transformer Engine's layers, beside the same trainer on the CPU.

In bfloat16, because in float32 these layers compute in TF32. `make test-gpu` asks for no Transformer Engine and leaves
this out.
"""

from __future__ import annotations

import importlib.util

import pytest

from tests.gpu.test_training import SMALL, beside_the_cpu

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", SMALL)
def test_its_layers_are_the_cpus(family, tmp_path):
    assert importlib.util.find_spec("transformer_engine") is not None, "Transformer Engine is not installed"
    beside_the_cpu(tmp_path, family, "bfloat16", "transformer_engine")
