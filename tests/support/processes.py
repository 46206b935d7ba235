"""What a process is, asked so that one which ends meanwhile fails no test."""

from __future__ import annotations

import psutil


def name_of(process: psutil.Process) -> str:
    """Its name; empty for one that is gone."""
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def command_line(process: psutil.Process) -> str:
    """Its words, a space between them; empty for one that is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
