"""Two tiny models of one shape: weights that change under running requests."""

import pytest

from tests.conftest import save_tiny_model
from tests.support import reference


@pytest.fixture(scope="module")
def folders(tiny_model_dir, tmp_path_factory):
    return [tiny_model_dir, save_tiny_model(tmp_path_factory.mktemp("other"), seed=1)]


@pytest.fixture(scope="module")
def models(folders):
    return [reference.load(folder) for folder in folders]
