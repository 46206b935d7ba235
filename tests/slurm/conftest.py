"""One cluster for the tests of a file that lose none of its nodes."""

import pytest

from tests.slurm.cluster import SlurmCluster


@pytest.fixture(scope="module")
def cluster():
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def slurm(cluster):
    """The cluster; a test that fails leaves no job that the next one would wait for."""
    yield cluster
    cluster.run("scancel", "--user=root")
