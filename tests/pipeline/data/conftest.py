from pathlib import Path

import pytest

from pipeline.config.model import TinyModelConfig
from pipeline.data.tiny_model import make_tiny_model
from pipeline.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), TinyModelConfig(layers=1), seed=0)


@pytest.fixture(scope="session")
def tokenizer(model_directory):
    return load_tokenizer(model_directory)
