"""The table by which files are ordered names files that there are."""

from tests.support.costs import SECONDS, TESTS


def test_every_file_of_the_table_is_there():
    assert [name for name in SECONDS if not (TESTS / name).is_file()] == []
