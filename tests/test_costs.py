"""The tables by which files are ordered name files that there are."""

import pytest

from tests.support.costs import PROOFS, SECONDS, TESTS


@pytest.mark.parametrize("table", [SECONDS, PROOFS], ids=["make test", "make proofs"])
def test_every_file_of_the_table_is_there(table):
    assert [name for name in table if not (TESTS / name).is_file()] == []
