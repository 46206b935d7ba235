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
