"""Folders whose sockets' paths the kernel takes."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile

import pytest

from pipeline import socket_folder
from pipeline.socket_folder import make_socket_folder


@pytest.mark.parametrize("length", [60, 98, 200])
def test_a_long_tmpdir_is_not_taken(tmp_path, monkeypatch, length):
    """The kernel takes 107 bytes; the socket's name here has 46."""
    long = tmp_path / ("x" * (length - len(str(tmp_path)) - 1) if length > len(str(tmp_path)) + 1 else "x" * length)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = make_socket_folder(60)
    try:
        assert len(str(folder)) <= 60
        assert not list(long.iterdir())
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(folder / ("s" * 46)))
    finally:
        shutil.rmtree(folder)


def test_a_short_tmpdir_is_taken(monkeypatch):
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        name = len(f"/sameroute-{os.getpid()}-abcdefgh")
        folder = make_socket_folder(len(short) + name)
        assert folder.parent.samefile(short)
        other = make_socket_folder(len(short) + name - 1)
        assert not other.parent.samefile(short)
        other.rmdir()


def test_no_place_at_all_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(socket_folder, "_SHORT", (str(tmp_path / "absent"),))
    with pytest.raises(OSError, match="set TMPDIR to a shorter path"):
        make_socket_folder(len(str(tmp_path)))
