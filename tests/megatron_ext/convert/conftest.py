"""A tiny model of each family, one of them with all that stands beside weights, and its checkpoint."""

import pytest

from pipeline.data.tokenizer import write_character_tokenizer
from tests.support.convert_cli import TO_MEGATRON, convert
from tests.support.tiny_families import DENSE_FAMILIES, FAMILIES, save_family


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    return {name: save_family(name, tmp_path_factory.mktemp("family")) for name in (*FAMILIES, *DENSE_FAMILIES)}


@pytest.fixture(scope="session")
def source(families):
    """A model directory with everything around the weights."""
    folder = families["deepseek_v3"]
    write_character_tokenizer(folder)
    (folder / "LICENSE").write_text("Free.")
    return folder


@pytest.fixture(scope="session")
def checkpoint(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoint") / "it"
    (answer,) = convert([TO_MEGATRON, source, out])
    assert answer.code == 0, answer.text
    return out
