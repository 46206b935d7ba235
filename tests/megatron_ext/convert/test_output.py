"""What the disk refuses while the rest is being written is not forgotten."""

import time

import pytest

from megatron_ext.convert import output


def test_a_refusal_in_the_meantime_is_raised_and_leaves_nothing(tmp_path, monkeypatch):
    refused = []

    def fsync(descriptor):  # as the kernel does: it says so once
        if not refused:
            refused.append(descriptor)
            raise OSError("Input/output error")

    monkeypatch.setattr(output.os, "fsync", fsync)

    def write():
        with output.output_directory(tmp_path / "out", needed_bytes=1) as partial:
            (partial / "it").write_text("written")
            until = time.monotonic() + 10
            while not refused and time.monotonic() < until:
                time.sleep(0.05)
            assert refused

    with pytest.raises(OSError, match="Input/output error"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (3_611_400, "3.6 MB"),
        (999_960, "1.0 MB"),
        (999_949_999, "999.9 MB"),
        (61_064_245_248, "61.1 GB"),
        (1_340_000_000_000, "1,340.0 GB"),
    ],
)
def test_a_size_is_told_in_a_unit_in_which_it_is_no_zero(nbytes, text):
    assert output.size_text(nbytes) == text
