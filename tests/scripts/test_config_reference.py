"""docs/config.md is what the configuration's classes say."""

import subprocess
import sys


def test_the_committed_page_is_up_to_date():
    done = subprocess.run([sys.executable, "scripts/config_reference.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
