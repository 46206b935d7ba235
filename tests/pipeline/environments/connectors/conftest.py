from __future__ import annotations

import pytest

from tests.support.served import kimi_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return kimi_tokenizer(tmp_path_factory.mktemp("tokenizer"))
