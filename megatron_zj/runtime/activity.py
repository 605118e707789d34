"""What each rank is doing, told to the others through the store, so that a lost rank can be named.

A collective that loses a member fails with a socket error (gloo) or not at all until its timeout (NCCL); neither says
who was lost, nor where.  Here a thread of every rank tells the rendezvous store which phase the rank is in, at once
when it changes and once a second.  When a collective fails, the others read the store and name rank and phase.

Keys: ``beat/<rank>`` holds one JSON ``Beat``; ``verdict``, once some rank is lost, the sentence about it and the rank
that says it aloud.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from torch.distributed.distributed_c10d import Store

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 3.5  # once something has failed, a rank that sends nothing for this long counts as lost
_MAX_PHASES = _MAX_RANGES = 8  # that a report of where all ranks stand names
EXIT_GRACE_SECONDS = 15.0  # how long a rank may stay in a collective that a lost rank will never join


def _nobody_listens() -> None:
    """The hook of an activity without a heartbeat."""


@dataclass
class Activity:
    """The phases this rank is in, outermost first: ``step 12 > critic.update``."""

    phases: tuple[str, ...] = ()
    since: float = field(default_factory=time.time)  # Unix seconds: when the innermost phase began
    on_change: Callable[[], None] = _nobody_listens

    @contextlib.contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        """Inside the block this rank is in ``phase``.  After an error the phase stays, for the report."""
        outer = self.phases
        self._enter((*outer, phase))
        yield
        self._enter(outer)

    def __str__(self) -> str:
        return " > ".join(self.phases) or "no phase"

    def _enter(self, phases: tuple[str, ...]) -> None:
        self.phases, self.since = phases, time.time()
        self.on_change()


@dataclass(frozen=True)
class Beat:
    """One rank's last word.

    ``failed``: by its own error.  ``left``: because another rank was lost, or told to by a signal.
    """

    phase: str = "start-up"
    since: float = 0.0  # Unix seconds on that rank's clock: when the phase began
    sent: float = 0.0  # same clock
    host: str = "unknown host"
    state: Literal["running", "failed", "left", "finished"] = "running"
    error: str = ""  # one line


class Heartbeat:
    """Tells the store what this rank does, and finds out who is lost.

    ``store`` must be a connection of its own: a blocking wait on a shared one would hold the beats up.
    ``timeout_seconds``: a rank that sends nothing for this long is declared lost even when no collective failed.
    ``kill`` ends the process with an exit code when the main thread is stuck and another rank is lost, or on SIGTERM.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        activity: Activity,
        timeout_seconds: float,
        kill: Callable[[int], None] = os._exit,
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._activity, self._timeout, self._kill = activity, timeout_seconds, kill
        self._last_of_rank_0 = Beat()  # where rank 0 hosts the store, its beats are lost with it
        self._verdict: tuple[str, int] | None = None
        self._beat = Beat(host=socket.gethostname())
        self._report_lock, self._reported = threading.Lock(), False
        self._closing = False
        self._bell, self._ring = socket.socketpair()
        self._ring.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat.  From the main thread, also answer SIGTERM with a report before leaving."""
        self._activity.on_change = self._wake
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _leave_it_to_the_thread)
            signal.set_wakeup_fd(self._ring.fileno(), warn_on_full_buffer=False)
            os.register_at_fork(before=_hold_sigterm, after_in_parent=_release_sigterm, after_in_child=_own_signals)
        self._send()
        self._thread.start()

    def close(self, state: Literal["failed", "left", "finished"], error: str = "") -> None:
        """Stop beating, with a last word that says why."""
        self._closing = True
        self._wake()
        self._thread.join(timeout=10)
        self._activity.on_change = _nobody_listens
        if threading.current_thread() is threading.main_thread():
            _own_signals()
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self._send(state, error)
            if state == "failed":
                self._find(verdict_of={self._rank: self._beat})
        if state != "finished" and self._rank == 0:
            time.sleep(2 * BEAT_SECONDS)  # this process may host the store: let the others read it

    def explain(self) -> tuple[str, bool]:
        """Which ranks are lost and what they were doing, and whether this rank is the one to say so aloud.

        The one that does adds where every rank stands.  Takes up to ``SILENCE_SECONDS``: silence must be told from
        slowness.
        """
        try:
            lost = {}
            if self._verdict is None and not (lost := self._failed()):
                before = self._read_all()
                time.sleep(SILENCE_SECONDS)
                lost = self._failed() or {
                    rank: beat
                    for rank, beat in self._read_all().items()
                    if beat.state == "running" and beat.sent == before[rank].sent and rank != self._rank
                }
            self._find(verdict_of=lost)
            if self._verdict is None or self._verdict[1] == self._rank:
                beats = self._read_all()
                found = f"every rank still answers; {_longest(beats)}" if self._verdict is None else self._verdict[0]
                return f"{found}; {standing({rank: beat.phase for rank, beat in beats.items()})}", True
        except RuntimeError:
            if self._verdict is None:
                return f"the store, which rank 0 may host, does not answer; {_sentence(0, self._last_of_rank_0)}", True
        return self._verdict[0], self._verdict[1] == self._rank

    def claim_report(self) -> bool:
        """True once in a process: either the main thread reports or the heartbeat's."""
        with self._report_lock:
            first, self._reported = not self._reported, True
            return first

    def claim_error(self, text: str) -> bool:
        """True on the first rank that fails with this message: it tells it, the others only leave."""
        with contextlib.suppress(RuntimeError):  # the store may be gone: better told twice than never
            return int(self._store.add(f"error/{hashlib.sha256(text.encode()).hexdigest()}", 1)) == 1
        return True

    def _run(self) -> None:
        watched = (self._rank + 1) % self._world_size
        latest, silent_from = Beat(), time.monotonic()
        lost_from: float | None = None
        while True:
            if select.select([self._bell], [], [], BEAT_SECONDS)[0] and signal.SIGTERM in self._bell.recv(4096):
                self._stop(128 + signal.SIGTERM, "told to stop (SIGTERM)")
            if self._closing:
                return
            with contextlib.suppress(RuntimeError):  # the store is gone: collectives fail and the main thread says so
                self._send()
                self._last_of_rank_0 = self._read(0)
                before, latest = latest, self._read(watched)
                if latest != before or latest.state != "running":
                    silent_from = time.monotonic()
                silent = time.monotonic() - silent_from > self._timeout
                self._find(verdict_of={watched: latest} if silent else {})
            if self._verdict is not None:
                lost_from = lost_from or time.monotonic()
                if time.monotonic() - lost_from > EXIT_GRACE_SECONDS:
                    self._stop(1, "another rank is lost")

    def _stop(self, exit_code: int, why: str) -> None:
        """Report and end the process; a main thread that is already reporting gets the time to finish."""
        if not self.claim_report():
            deadline = time.monotonic() + EXIT_GRACE_SECONDS
            while time.monotonic() < deadline and not self._closing:
                time.sleep(0.05)
            if self._closing:
                return
        else:
            text, _ = self.explain()
            sys.stderr.write(f"rank {self._rank}: {why} while in {str(self._activity)!r}; {text}\n")
            sys.stderr.flush()
        with contextlib.suppress(RuntimeError):
            self._send("left")
        self._kill(exit_code)

    def _send(self, state: Literal["running", "failed", "left", "finished"] = "running", error: str = "") -> None:
        phase, since = str(self._activity), self._activity.since
        self._beat = replace(self._beat, phase=phase, since=since, sent=time.time(), state=state, error=error)
        self._store.set(f"beat/{self._rank}", json.dumps(asdict(self._beat)))

    def _read(self, rank: int) -> Beat:
        key = f"beat/{rank}"
        return Beat(**json.loads(self._store.get(key))) if self._store.check([key]) else Beat()

    def _read_all(self) -> dict[int, Beat]:
        return {rank: self._read(rank) for rank in range(self._world_size)}

    def _failed(self) -> dict[int, Beat]:
        return {rank: beat for rank, beat in self._read_all().items() if beat.state == "failed"}

    def _find(self, verdict_of: dict[int, Beat]) -> None:
        """Learn the verdict if there is one; else make it, of these lost ranks."""
        if self._verdict is None and verdict_of and not self._store.check(["verdict"]):
            speaker = min((rank for rank in range(self._world_size) if rank not in verdict_of), default=self._rank)
            text = "; ".join(_sentence(*item) for item in sorted(verdict_of.items()))
            self._store.set("verdict", json.dumps((text, speaker)))
        if self._verdict is None and self._store.check(["verdict"]):
            text, speaker = json.loads(self._store.get("verdict"))
            self._verdict = text, speaker

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: the thread has plenty to wake up for
            self._ring.send(b"\0")


def _leave_it_to_the_thread(signal_number: int, frame: object) -> None:
    """Python's handler has nothing to do: the wake-up descriptor has already rung the heartbeat thread's bell.

    (It would run between two bytecodes, which a main thread inside a collective does not reach.)
    """


def _hold_sigterm() -> None:
    """Around a fork: the child has its parent's bell until ``_own_signals``; a signal to it must wait for that."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _release_sigterm() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _own_signals() -> None:
    """The default SIGTERM again, and no bell."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _release_sigterm()


def _longest(beats: Mapping[int, Beat]) -> str:
    """The ranks that have been in their phase for longest: one that hangs is among them."""
    first = sorted(beats, key=lambda rank: beats[rank].since - beats[rank].sent)[:_MAX_PHASES]
    return "; ".join(_sentence(rank, beats[rank]) for rank in sorted(first))


def standing(phases: Mapping[int, str]) -> str:
    """Where every rank stands, by phase: most ranks' first, then the ones of few; bounded, however many there are."""
    groups: dict[str, list[int]] = {}
    for rank, phase in sorted(phases.items()):
        groups.setdefault(phase, []).append(rank)
    rare = sorted(groups.items(), key=lambda item: (len(item[1]), item[1][0]))
    common_first = [*rare[-1:], *rare[:-1]]
    shown = [f"{_ranges(ranks)}: {phase!r}" for phase, ranks in common_first[:_MAX_PHASES]]
    rest = sum(len(ranks) for _, ranks in common_first[_MAX_PHASES:])
    return "; ".join([*shown, *([f"{rest} ranks in {len(groups) - _MAX_PHASES} other phases"] if rest else [])])


def _ranges(ranks: list[int]) -> str:
    """``ranks 0-3, 5`` of ascending ranks."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    more = [f"... ({len(ranks)} in all)"] if len(words) > _MAX_RANGES else []
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join([*words[:_MAX_RANGES], *more])}"


def _sentence(rank: int, beat: Beat) -> str:
    words = {"running": "last heard", "failed": "failed", "left": "left", "finished": "ended"}
    error = f" with {beat.error}" if beat.error else ""
    seconds = max(0.0, beat.sent - beat.since)
    return f"rank {rank} ({beat.host}) {words[beat.state]}{error} in phase {beat.phase!r}, {seconds:.1f} s into it"
