"""How the ranks of a distributed run meet, and how they notice that one of them has died."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from pi0.base.errors import InputError
from pi0.ranks.collectives import rank_and_world_size

TORCHRUN_SETS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
BEAT_S = 1.0  # time from one sign of life to the next
SILENCE_S = 30.0  # without a sign of life for so long, a rank counts as dead
STORE_LIMIT = datetime.timedelta(seconds=30)  # time in which the launcher must answer
PRINT_S = 10.0  # time that a rank has to print an error before the others end without it
MEET_S = 120.0  # time in which all ranks must come to a meeting; a host may be slow to load the program
# A rank may wait for the rollouts of others. A dead rank is noticed by its silence, not by this limit.
COLLECTIVE_LIMIT = datetime.timedelta(hours=6)


def under_torchrun() -> bool:
    """Whether torchrun has started this process as a rank; if a part of its variables is missing, the process ends.

    Cluster operators may set RANK alone. Without a WORLD_SIZE, or with 1, that means a single process.
    """
    missing = [name for name in TORCHRUN_SETS if name not in os.environ]
    if missing and os.environ.get("WORLD_SIZE", "1") != "1":
        exit_with(
            InputError(
                f"WORLD_SIZE = {os.environ['WORLD_SIZE']} is set, and {', '.join(missing)} not: start the ranks with "
                "torchrun, which sets them all, or unset WORLD_SIZE"
            )
        )
    return not missing


def exit_with(error: InputError) -> NoReturn:
    """End this rank with the error's message; if several ranks have the same one, one rank of each host prints it."""
    entry = f"said/{socket.gethostname()}/{error}"
    store, first = _first_to_say(entry)
    if first:
        print(f"error: {error}", file=sys.stderr, flush=True)
    with contextlib.suppress(RuntimeError):  # the store does not answer, so every rank has printed
        if store is not None and first:
            store.set(f"{entry}/printed", "")
        elif store is not None:
            # The first may still be printing, and torchrun stops all ranks when one has ended.
            store.wait([f"{entry}/printed"], datetime.timedelta(seconds=PRINT_S))
    sys.exit(error.status)


def join_ranks() -> None:
    """Become one of the ranks that torchrun has started; if another one is missing, this process ends."""
    try:
        _meet("start", "")
    except InputError as error:
        exit_with(error)
    dist.init_process_group(backend(), timeout=COLLECTIVE_LIMIT)


class RankWatch:
    """Notices ranks that have died, on any host, and ends this process instead of letting it wait.

    Each rank gives a sign of life every second through the key-value store of the rendezvous. Torchrun alone
    stops the ranks on the host of a dead rank, but names it only in a long report. Ranks on other hosts would wait
    in a collective until its time limit.
    """

    def __init__(self, silence_s: float):
        self.rank, self.world_size = rank_and_world_size()
        self._silence_s = silence_s
        self.stop_asked = False  # by any rank
        # The watch has its own connection: one that waits in a collective's set-up would delay the signs of life.
        self._store = _connect()
        self._beat("0")  # all ranks give a sign of life before any rank looks for one
        who = [socket.gethostname(), os.getpid(), _machine()]
        brought = [json.loads(other) for other in _meet("watch", json.dumps(who))]
        self._peers: list[tuple[str, int]] = [(host, process) for host, process, _ in brought]
        self._here = [machine == _machine() for *_, machine in brought]
        self._beside_rank_0 = [machine == brought[0][-1] for *_, machine in brought]
        self._stopped = threading.Event()
        self._ending = threading.Lock()
        self._answered = time.monotonic()  # when the launcher last answered
        self._threads = [
            threading.Thread(target=watch, name="rank watch", daemon=True)
            for watch in (self._watch, self._watch_launcher)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self, finished: bool) -> None:
        """Stop watching; if this rank has not `finished`, the others will count it as dead."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(BEAT_S + self._silence_s)  # the launcher may have disappeared silently
        if finished and not any(thread.is_alive() for thread in self._threads):
            with contextlib.suppress(RuntimeError):  # the store ends with the first host's launcher
                self._beat("finished")

    def ask_to_stop(self) -> None:
        """Tell every rank, within a second, that the run shall stop."""
        if not self.stop_asked:
            self._store.set("stop", "1")
            self.stop_asked = True

    def dead(self) -> str | None:
        """One line that names a dead rank of this host; None while all are alive."""
        for rank, (host, process) in enumerate(self._peers):
            if (
                rank != self.rank
                and self._here[rank]
                and not _is_alive(process)
                and not self._has_finished(rank)
            ):
                return f"rank {rank} (process {process} on {host}) has died"
        return None

    def _watch(self) -> None:
        heard = {rank: ("", time.monotonic()) for rank in range(self.world_size) if rank != self.rank}
        beats = 0
        while not self._stopped.wait(BEAT_S):
            beats += 1
            try:
                self._beat(str(beats))
                self.stop_asked = self.stop_asked or self._store.check(["stop"])
                for rank, (last, since) in heard.items():
                    sign = self._sign(rank)
                    if sign != last:
                        heard[rank] = (sign, time.monotonic())
                    elif sign != "finished" and time.monotonic() - since > self._silence_s:
                        host, process = self._peers[rank]
                        silence = f"rank {rank} (process {process} on {host}) has been silent for"
                        self._end(f"{silence} {self._silence_s:.0f} s")
                if death := self.dead():
                    self._end(death)
                self._answered = time.monotonic()
            except RuntimeError:
                time.sleep(BEAT_S)  # a rank that was killed with the launcher takes a moment to end
                self._end(f"{self._launcher()} is gone")

    def _watch_launcher(self) -> None:
        # This thread only reads the clock: if the launcher's host is cut off, a request to it never returns.
        while not self._stopped.wait(BEAT_S):
            if time.monotonic() - self._answered > self._silence_s:
                self._end(f"{self._launcher()} has been silent for {self._silence_s:.0f} s")

    def _launcher(self) -> str:
        """Name the launcher of rank 0, whose store connects the ranks, and its ranks that may have died with it."""
        beside = [
            f"rank {rank} (process {process} on {host})"
            for rank, (host, process) in enumerate(self._peers)
            if rank != self.rank
            and self._beside_rank_0[rank]
            and not (self._here[rank] and _is_alive(process))
        ]
        launcher = f"the launcher on {os.environ['MASTER_ADDR']} that connects the ranks"
        return f"{launcher}, with {', '.join(beside)}," if beside else launcher

    def _beat(self, sign: str) -> None:
        self._store.set(f"sign of life/{self.rank}", sign)

    def _has_finished(self, rank: int) -> bool:
        """Whether a rank has reported that it finished; False if the launcher does not answer."""
        with contextlib.suppress(RuntimeError):
            return self._sign(rank) == "finished"
        return False

    def _sign(self, rank: int) -> str:
        return self._store.get(f"sign of life/{rank}").decode()

    def _end(self, cause: str) -> NoReturn:
        """End this process from any thread; its rollout workers end when their pipes close."""
        # The watching thread, a failed collective and a signal may all come here: only the first prints.
        if self._ending.acquire(blocking=False):
            print(f"error: {cause}; rank {self.rank} ends", file=sys.stderr, flush=True)
        time.sleep(0.5)  # a thread of this process copies the output to a log file and needs time
        os._exit(1)


@contextlib.contextmanager
def watched_ranks(silence_s: float = SILENCE_S) -> Iterator[RankWatch | None]:
    """In this context the death of a rank ends the others within a minute, each with a line that names it.

    Args:
        silence_s: without a sign of life for so many seconds, a rank counts as dead.
    """
    if rank_and_world_size()[1] == 1:
        yield None
        return
    watch = RankWatch(silence_s)

    def terminated(number: int, _: object) -> NoReturn:
        # Torchrun sends SIGTERM to the other ranks when one has failed.
        if death := watch.dead():
            watch._end(death)
        sys.exit(128 + number)

    previous, finished = signal.signal(signal.SIGTERM, terminated), False
    try:
        yield watch
        finished = True
    except RuntimeError:
        # A collective fails as soon as the other side's connection closes, which is before its process has ended.
        time.sleep(2 * BEAT_S)
        if death := watch.dead():
            watch._end(death)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
        watch.stop(finished)


def backend() -> str:
    """Libraries for the collectives: NCCL between GPUs, gloo for everything else."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _connect() -> dist.TCPStore:
    """A connection to the key-value store that torchrun's ranks share."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=STORE_LIMIT,
    )


def _meet(place: str, message: str) -> list[str]:
    """Wait for all ranks at `place` and return their messages, by rank; each `place` can be used once in a run.

    It uses the launcher's store, not a collective: a rank may already have ended, and nothing watches it yet.

    Raises:
        InputError: a rank has not come within `MEET_S`, or the launcher has ended.
    """
    started, missing = time.monotonic(), list(range(int(os.environ["WORLD_SIZE"])))
    entry = f"{place}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        store = _connect()
        store.set(f"{entry}/{os.environ['RANK']}", message)
        while missing := [rank for rank in missing if not store.check([f"{entry}/{rank}"])]:
            if time.monotonic() - started > MEET_S:
                raise InputError(
                    f"rank {missing[0]} has not come to the ranks' {place} within {MEET_S:.0f} s: it has ended before, "
                    "and its own host printed why, or its host is very slow"
                )
            time.sleep(0.1)
        return [store.get(f"{entry}/{rank}").decode() for rank in range(int(os.environ["WORLD_SIZE"]))]
    except RuntimeError as error:
        raise InputError(
            f"the launcher on {os.environ['MASTER_ADDR']} that connects the ranks was gone before all had come to the "
            f"ranks' {place}: the output of that host names the cause"
        ) from error


def _first_to_say(entry: str) -> tuple[dist.TCPStore | None, bool]:
    """The ranks' store, and whether this is the first rank with this entry; (None, True) if there is no store."""
    if rank_and_world_size()[1] == 1:
        return None, True
    try:
        store = _connect()
        return store, store.add(entry, 1) == 1
    except RuntimeError:  # the store does not answer, so every rank prints
        return None, True


def _machine() -> str:
    """Name of the process table in which this process's id is valid: hosts and containers may share a host name."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _is_alive(process: int) -> bool:
    """Whether a process of this host still runs; a zombie does not."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):  # the second if it ends meanwhile
        return False
