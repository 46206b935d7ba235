import numpy as np
import pytest

from tests.support.dumped_groups import make_dump, make_group


@pytest.fixture
def dump():
    rng = np.random.default_rng(0)
    return make_dump(make_group(rng, 0), make_group(rng, 1, 2, (5, 2)))
