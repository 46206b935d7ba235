"""The light process between a run and its verifiers: one thread, no torch, no code of a user.

    driver  <- one socket ->  supervisor  <- a socket each, and a pipe of what they print ->  workers

It forks workers, which takes milliseconds because it has imported what they share; gives each one answers; kills the
one that takes too long, too much memory or prints too much, with all that it started; and replaces it. When the
driver's socket closes or the driver is gone, however it ended, everything below is killed and it ends too. Between
driver and supervisor stands a guard, which does the same where the supervisor itself is killed.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections import deque
from dataclasses import replace

from pipeline.rewards.hired import Hired, fork_worker
from pipeline.rewards.processes import below, end_below, fork_guarded, kill, own_memory, parents
from pipeline.rewards.protocol import (
    READY,
    REFUSED,
    FailureKind,
    Limits,
    Message,
    ProtocolError,
    Verdict,
    component_of,
    messages_in,
    pack,
    pack_verdict,
    questions_in,
)
from pipeline.rewards.registry import Component, is_quick, preload, title
from pipeline.rewards.worker import MUTE

TICK_S, IDLE_S = 0.05, 1.0
"""How often limits are looked at while a verifier is at work, and whether the driver lives while none is."""

TREE_S = 0.5
"""How often the processes that verifiers started are counted: that reads all of /proc."""

BATCH_S = 0.005
"""Answers are handed out by as many as take about this long, so that quick verifiers cost few messages."""

NAP_S = 0.0005
"""Verdicts of quick verifiers are read several at a time: to wake for each would cost more than they do."""

FROM_OUTSIDE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What a cluster sends to every process of a job that is to end: the step in progress is graded all the same."""

LOAD_ATTEMPTS = 3
"""So often in a row a verifier may fail to be loaded again before the answers that wait for it fail."""

_MUTE = "closed what its worker speaks to the run through"


def main(descriptor: int) -> None:
    """Serve the driver at the other end of a socket; the first line that it sends is the setting, as JSON."""
    driver = socket.socket(fileno=descriptor)
    line = b""
    while not line.endswith(b"\n"):
        byte = driver.recv(1)
        if not byte:
            return
        line += byte
    setting = json.loads(line)
    for number in FROM_OUTSIDE:
        signal.signal(number, signal.SIG_IGN)  # the driver decides when grading ends
    guard = fork_guarded(setting["driver"])
    sys.path[:] = setting["path"]
    gc.disable()
    components = [Component(**fields) for fields in setting["components"]]
    preload(components)
    gc.freeze()  # pages that the collector does not touch stay shared with the workers
    Supervisor(driver, components, setting["workers"], Limits(**setting["limits"])).run(guard)


class Supervisor:
    """The workers of all components: each can grade for any of them."""

    def __init__(self, driver: socket.socket, components: list[Component], count: int, limits: Limits):
        self.quick = all(map(is_quick, components))
        self.driver, self.components, self.limits = driver, components, limits
        self.count = 1 if self.quick else count
        self.timeouts = [limits.timeout_s if c.timeout_s is None else c.timeout_s for c in components]
        self.driver.setblocking(False)
        self.inbox, self.outbox = bytearray(), bytearray()
        self.waiting: deque[tuple[int, bytes]] = deque()
        self.workers: dict[int, Hired] = {}
        self.refusals = 0
        self.said_ready = False
        self.seconds = BATCH_S
        """Of one answer, lately."""
        self.next_tree = 0.0
        self.orphans = False
        self.again: set[int] = set()
        """Answers whose worker somebody ended, and that have therefore a second one."""
        self.selector = selectors.DefaultSelector()
        self.selector.register(driver, selectors.EVENT_READ)
        self.woken, wake = socket.socketpair()
        for end in (self.woken, wake):
            end.setblocking(False)
        self.wake = wake
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector.register(self.woken, selectors.EVENT_READ)

    def run(self, guard: int) -> None:
        """Until the driver goes, or the guard."""
        self.hire()
        while os.getppid() == guard:
            busy = any(w.given or not w.ready for w in self.workers.values()) or self.orphans
            for key, events in self.selector.select(TICK_S if busy else IDLE_S):
                if key.fileobj is self.driver:
                    if not self.hear_driver(events):
                        end_below()
                        return
                elif key.fileobj is self.woken:
                    with contextlib.suppress(BlockingIOError):
                        self.woken.recv(4096)
                elif key.data in self.workers:
                    self.hear_worker(self.workers[key.data], key.fileobj, events)
            self.reap()
            self.watch()
            self.hand_out()
            self.send()
            if not self.quick and any(len(w.given) > 1 for w in self.workers.values()):
                time.sleep(NAP_S)
        end_below()

    # The driver

    def hear_driver(self, events: int) -> bool:
        """Take questions. False where it has closed its end."""
        if events & selectors.EVENT_READ:
            try:
                data = self.driver.recv(1 << 20)
            except BlockingIOError:
                return True
            except ConnectionError:
                return False
            if not data:
                return False
            self.inbox += data
            if not self.waiting and not any(w.given for w in self.workers.values()):
                self.refusals = 0  # another step: what hindered loading may be over
                self.hire()
            self.waiting.extend(questions_in(self.inbox))
        return True

    def say(self, number: int, verdict: Verdict) -> None:
        self.outbox += pack_verdict(number, verdict)

    def send(self) -> None:
        """What the driver's socket takes of what there is to say."""
        with contextlib.suppress(BlockingIOError, ConnectionError):  # a driver that has gone is seen when it is heard
            while self.outbox:
                del self.outbox[: self.driver.send(self.outbox)]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.outbox else 0)
        self.selector.modify(self.driver, wanted)

    # Workers

    def hire(self) -> None:
        """Fork what is missing of the workers."""
        while len(self.workers) < self.count and self.refusals < LOAD_ATTEMPTS:
            hired = fork_worker(self.components, self.limits)
            self.workers[hired.process] = hired
            self.selector.register(hired.channel, selectors.EVENT_READ, hired.process)
            self.selector.register(hired.output, selectors.EVENT_READ, hired.process)

    def hand_out(self) -> None:
        """Answers to workers that have none; where no worker can be had, they fail."""
        if not self.workers and self.refusals >= LOAD_ATTEMPTS:
            while self.waiting:
                number, _ = self.waiting.popleft()
                self.say(number, Verdict(kind="not_loaded", what="could not be loaded again after its worker had died"))
        idle = [w for w in self.workers.values() if w.ready and not w.given and w.closed is None]
        for free in idle:
            if not self.waiting:
                break
            fair = -(-len(self.waiting) // len(idle))
            share = fair if self.quick else max(1, min(fair, int(BATCH_S / self.seconds)))
            for _ in range(min(len(self.waiting), share)):
                free.give(*self.waiting.popleft())
            free.next_answer()
            self.feed(free)

    def feed(self, hired: Hired) -> None:
        """What the worker's socket takes of its answers."""
        left = hired.send()
        if hired.closed is None:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if left else 0)
            self.selector.modify(hired.channel, wanted, hired.process)

    def hear_worker(self, hired: Hired, source: object, events: int) -> None:
        """Verdicts, or what it prints."""
        if source is not hired.channel:
            self.read_output(hired)
            return
        if events & selectors.EVENT_WRITE:
            self.feed(hired)
        if events & selectors.EVENT_READ:
            self.read_verdicts(hired)

    def read_output(self, hired: Hired) -> None:
        if not hired.read_output():
            with contextlib.suppress(KeyError):  # it has been read to its end before
                self.selector.unregister(hired.output)
        if hired.printed > self.limits.output_bytes and hired.given:
            self.dismiss(hired, "output", f"wrote more than {self.limits.output_bytes:,} bytes to stdout and stderr")

    def read_verdicts(self, hired: Hired) -> None:
        """What it says of its answers; one that says anything else is dismissed."""
        try:
            data = hired.channel.recv(1 << 18)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            if hired.closed is None:
                hired.closed = time.monotonic()
                self.selector.unregister(hired.channel)
            return
        hired.inbox += data
        try:
            for message in messages_in(hired.inbox):
                self.take(hired, message)
                if hired.process not in self.workers:
                    return
        except ProtocolError:
            self.dismiss(hired, "crashed", "wrote into what its worker says to the run")

    def take(self, hired: Hired, message: Message) -> None:
        code = message.code
        if not hired.ready:
            if code == READY:
                hired.ready, self.refusals = True, 0
                if not self.said_ready:
                    self.said_ready = True
                    self.outbox += pack(0, READY)
            elif code == REFUSED:
                self.refuse(hired, message.text)
            else:
                raise ProtocolError("a verdict before the verifier was loaded")
            return
        if code in (READY, REFUSED) or not hired.given or hired.given[0][0] != message.number:
            raise ProtocolError("a verdict on what it was not asked")
        seconds = time.monotonic() - hired.since
        self.took(seconds)
        hired.given.popleft()
        hired.next_answer()
        verdict = replace(message.verdict, seconds=seconds)
        self.say(message.number, verdict)
        if verdict.kind == "left_behind":  # a thread ends with its process only
            self.dismiss(hired, None, "")

    def took(self, seconds: float) -> None:
        """An answer took this long: what is slow is believed at once, what is quick by and by."""
        self.seconds = max(1e-6, seconds, 0.7 * self.seconds + 0.3 * seconds)

    def refuse(self, hired: Hired, why: str, *, ended: bool = False) -> None:
        """The verifier could not be loaded."""
        self.refusals += 1
        if not self.said_ready:
            self.outbox += pack(0, REFUSED, text=why)
            self.refusals = LOAD_ATTEMPTS
        self.dismiss(hired, None, "", ended=ended)

    def dismiss(self, hired: Hired, kind: FailureKind | None, what: str, *, ended: bool = False) -> None:
        """Kill a worker and all that it started, and hire another. kind: of the failure of the answer that it is at;
        null where it is at none. Its other answers wait for another. ended: it has, and its number may be another's."""
        if kind is not None and hired.given:
            number, _ = hired.given.popleft()
            seconds = time.monotonic() - hired.since
            self.took(seconds)
            self.say(number, Verdict(kind=kind, what=what + hired.said(), seconds=seconds))
        self.waiting.extendleft(reversed(hired.given))
        hired.given.clear()
        del self.workers[hired.process]
        for source in (hired.channel, hired.output):
            with contextlib.suppress(KeyError):
                self.selector.unregister(source)
        hired.close()
        if not ended:
            kill([hired.process, *below(hired.process, parents())])
        self.orphans = True
        self.hire()

    # What workers do not say themselves

    def reap(self) -> None:
        """Workers and orphans that have ended."""
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not process:
                break
            if process in self.workers:
                self.ended(self.workers[process], status)
        if self.orphans:
            self.kill_orphans()

    def kill_orphans(self) -> None:
        """What dismissed and dead workers had started: it has become this process's, whatever it did to hide."""
        tree = parents()
        found = [process for process, parent in tree.items() if parent == os.getpid() and process not in self.workers]
        kill([p for orphan in found for p in (orphan, *below(orphan, tree))])
        self.orphans = bool(found)

    def ended(self, hired: Hired, status: int) -> None:
        """A worker that nobody killed from here."""
        while hired.process in self.workers and hired.closed is None:  # what it said before
            before = len(hired.inbox), len(hired.given), hired.ready
            self.read_verdicts(hired)
            if (len(hired.inbox), len(hired.given), hired.ready) == before:
                break
        if hired.process not in self.workers:
            return
        self.read_output(hired)
        if hired.process not in self.workers:
            return
        code = os.waitstatus_to_exitcode(status)
        kind: FailureKind = "crashed" if code < 0 else "exited"
        what = f"died of {_signal_name(-code)}" if code < 0 else f"ended its process with code {code}"
        if code == MUTE:
            kind, what = "crashed", _MUTE
        if not hired.ready:
            why = f"{title(self.components)} cannot be imported: it {what} while it was imported"
            self.refuse(hired, why + hired.said(), ended=True)
            return
        if -code in FROM_OUTSIDE and hired.given and hired.given[0][0] not in self.again:
            self.again.add(hired.given[0][0])
            self.dismiss(hired, None, "", ended=True)
            return
        self.dismiss(hired, kind, what, ended=True)

    def watch(self) -> None:
        """Dismiss who is over a limit."""
        now = time.monotonic()
        tree = None
        if now >= self.next_tree:
            self.next_tree = now + TREE_S
            if any(w.given and now - w.since > TICK_S for w in self.workers.values()):
                tree = parents()
        for hired in list(self.workers.values()):
            took = now - hired.since
            if hired.closed is not None and now - hired.closed > TICK_S:
                self.dismiss_or_refuse(hired, "crashed", _MUTE)
            elif not hired.ready and took > self.limits.start_s:
                self.dismiss_or_refuse(hired, "timeout", f"took more than {self.limits.start_s:g} s")
            elif hired.given and took > (allowed := self.timeouts[component_of(hired.given[0][1])]):
                self.dismiss(hired, "timeout", f"took more than {allowed:g} s")
            elif hired.given and took > TICK_S:
                self.weigh(hired, [] if tree is None else below(hired.process, tree))

    def dismiss_or_refuse(self, hired: Hired, kind: FailureKind, what: str) -> None:
        if hired.ready:
            self.dismiss(hired, kind, what)
        else:
            self.refuse(hired, f"{title(self.components)} cannot be imported: it {what} while it was imported")

    def weigh(self, hired: Hired, started: list[int]) -> None:
        """Dismiss a worker that, with all that it started, takes more memory or processes than it may."""
        if len(started) > self.limits.processes:
            self.dismiss(hired, "processes", f"started more than {self.limits.processes} processes")
        elif sum(map(own_memory, (hired.process, *started))) > self.limits.memory_gb * 1e9:
            self.dismiss(hired, "memory", f"took more than {self.limits.memory_gb:g} GB of memory")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
