"""Programs that a model might write: right ones, and hostile ones of every kind, which are all wrong answers.

Each reads a number and should print its square. PROBE is replaced by a name that no other process has.
"""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

import numpy as np

from pipeline.rewards import Component, Question
from pipeline.types import Prompt

RIGHT = (
    "print(int(input()) ** 2)",
    """
import math
n = int(input())
print(math.prod([n, n]))
""",
    """
def square(n):
    return n * n

if __name__ == '__main__':
    print(square(int(input())))
""",
    """
import sys
n = int(sys.stdin.read())
print(sum(n for _ in range(n)))
""",
    """
import subprocess, sys
n = input()
print(subprocess.check_output([sys.executable, '-c', f'print({n}**2)'], text=True))
""",
    """
import threading
out = []
t = threading.Thread(target=lambda: out.append(int(input()) ** 2))
t.start(); t.join()
print(out[0])
exit()
""",
)

HOSTILE = {
    "fork bomb": """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
    "fork bomb of a shell": """
import os
os.system(':(){ :|:& };:')
import time
time.sleep(1000)
""",
    "threads without end": """
import threading, time
while True:
    threading.Thread(target=time.sleep, args=(99,)).start()
""",
    "memory bomb": """
kept = []
while True:
    kept.append(b'1' * 10_000_000)
""",
    "memory bomb of children": """
import os
for _ in range(3):
    os.fork()
kept = []
while True:
    try:
        kept.append(bytearray(b'1' * 5_000_000))
    except MemoryError:
        pass
""",
    "memory bomb in shared memory": """
import mmap
kept = []
while True:
    m = mmap.mmap(-1, 10_000_000)
    m.write(b'1' * 10_000_000)
    kept.append(m)
""",
    "memory bomb in files": """
import itertools
for i in itertools.count():
    for place in ('/work', '/tmp', '/dev/shm'):
        open(f'{place}/{i}', 'wb').write(b'1' * 10_000_000)
""",
    "memory that no limit counts": """
import os
kept = []
while True:
    f = os.memfd_create('x')
    os.write(f, b'1' * 10_000_000)
    kept.append(f)
""",
    "endless loop": """
while True:
    pass
""",
    "endless loops of children": """
import os
for _ in range(3):
    os.fork()
while True:
    pass
""",
    "sleep": """
import time
time.sleep(1000)
""",
    "stops itself": """
import os, signal
os.kill(os.getpid(), signal.SIGSTOP)
""",
    "signals ignored": """
import signal
for s in range(1, 64):
    try:
        signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
""",
    "file writes outside": """
import os
for place in ('/', '/usr', '/etc', '/root', '/home', '/dev', '/proc', '/sys', '/usr/bin'):
    try:
        open(f'{place}/PROBE', 'w').write('here')
        print('wrote', place)
    except OSError:
        pass
os.rename('/usr/bin/env', '/usr/bin/PROBE')
""",
    "files of the run": """
import glob
print(glob.glob('/work/*'), glob.glob('/root/*'), glob.glob('/home/*'), glob.glob('/tmp/*'))
print(open('/etc/passwd').read())
""",
    "a socket": """
import socket
s = socket.create_connection(('127.0.0.1', PORT), 2)
s.sendall(b'hello')
print(49)
""",
    "a socket of the file system": """
import glob, socket
for place in ('/var/run/docker.sock', '/run/dbus/system_bus_socket'):
    s = socket.socket(socket.AF_UNIX)
    s.connect(place)
print(49)
""",
    "the environment of others": """
import glob, os
for f in glob.glob('/proc/[0-9]*/environ'):
    print(open(f).read())
print(dict(os.environ))
""",
    "the environment of its parent": """
import os
print(open(f'/proc/{os.getppid()}/environ').read())
""",
    "kills its parent": """
import os, signal, time
os.kill(os.getppid(), signal.SIGKILL)
os.kill(1, signal.SIGKILL)
time.sleep(1000)
""",
    "kills all": """
import os, signal
os.kill(-1, signal.SIGKILL)
while True:
    pass
""",
    "1 GB of output": """
import sys
for _ in range(1000):
    sys.stdout.write('1' * 1_000_000)
""",
    "1 GB of errors": """
import os
for _ in range(1000):
    os.write(2, b'1' * 1_000_000)
print(49)
""",
    "output behind a grandchild": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        [print('PROBE') for _ in iter(int, 1)]
    os._exit(0)
print(1)
""",
    "a grandchild that outlives": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(0)
print(1)
""",
    "a grandchild that loops": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        [0 for _ in iter(int, 1)]
    os._exit(0)
print(1)
""",
    "new namespaces": """
import os
os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS)
print(49)
""",
    "looks into another": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(49 if libc.ptrace(16, 1, 0, 0) == 0 else ctypes.get_errno())
""",
    "another user": """
import os
os.setuid(0)
print(49)
""",
    "more than it may have": """
import resource
resource.setrlimit(resource.RLIMIT_NPROC, (10**6, 10**6))
print(49)
""",
    "crash": """
import ctypes
ctypes.string_at(0)
""",
    "exit": """
import os
print(49, flush=True)
os._exit(3)
""",
    "deep recursion": """
import sys
sys.setrecursionlimit(10**9)
f = lambda n: f(n + 1)
f(0)
""",
    "no Python": "this is no program",
    "prints nothing": "",
    "a number without end": "print(9 ** 9 ** 9)",
}
"""What it does -> the program. All are wrong, also where they print 49, the right answer: that they may not do."""

LIMITS = {
    "mode": "bubblewrap",
    "url": None,
    "python": None,
    "cpu_s": 1,
    "wall_s": 3.0,
    "total_s": 3.0,
    "memory_mb": 200 + os.getpid() % 97,
    "processes": 16,
    "files_mb": 32,
    "output_kb": 1024,
}
"""Of these programs, as plain values of a SandboxConfig; the memory tells them from those of another test's process."""


def verifier(**limits):
    """The code verifier with these limits."""
    settings = {"kind": "code", "tests": "tests", "share": False, "sandbox": LIMITS | limits}
    return Component("code", settings, timeout_s=30.0)


def question(program, index=0):
    """An answer with a program that should print the square of 7."""
    ids = np.zeros(3, np.int32)
    tests = {"inputs": ["7\n"], "outputs": ["49\n"]}
    prompt = Prompt(ids, "Print the square of a number.", {"tests": tests}, index)
    return Question(prompt, f"```python\n{program}\n```", ids, "stop")


def running(memory_mb=LIMITS["memory_mb"]):
    """Sandboxes with this memory that are there."""
    limit, found = f"--as={(memory_mb + 512) * 1_000_000}:".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if limit in words and state not in "ZX":
                found.append(int(entry.name))
    return found


class Watch:
    """What hostile programs of one test would leave: connections to a server, files of a name of their own."""

    def __init__(self):
        self.name = f"probe-{uuid.uuid4().hex}"
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.setblocking(False)

    def programs(self):
        """Those of HOSTILE, with the name and the port that are watched; what each does -> program."""
        port = str(self.server.getsockname()[1])
        return {what: text.replace("PROBE", self.name).replace("PORT", port) for what, text in HOSTILE.items()}

    def left(self):
        """What is there, in words."""
        folders = ("/", "/usr", "/etc", "/root", "/home", "/dev", "/dev/shm", "/tmp", "/usr/bin", "/work")
        found = [f"{folder}/{self.name}" for folder in folders if os.path.exists(f"{folder}/{self.name}")]
        try:
            self.server.accept()
            found.append("a connection")
        except BlockingIOError:
            pass
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.close()
