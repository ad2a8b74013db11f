"""Accesses to memory: what a block's threads did between two barriers, judged and counted.

Each thread logs its accesses, one number for each: address << SITE_BITS | site, where a site is one instruction of the
source. At a barrier the logs of all threads become columns. Races are places that two threads meet at, one of them
writing; poison is what is read and was not written. Accesses of a warp's lanes that go together cost 32-byte sectors of
global memory, or passes over the 32 banks of shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .faults import RaceError, UninitialisedError

WARP = 32
SITE_BITS = 16
# Logged when the warp has met at a syncwarp.
MET = -1
READ, WRITE, ISSUE, ARRIVAL = range(4)


# --- what was counted ------------------------------------------------------------------------------------------


class Site(NamedTuple):
    """One instruction that accesses memory."""

    code: Any
    line: int
    nbytes: int
    kind: int
    shared: bool

    def __str__(self) -> str:
        return f"{Path(self.code.co_filename).name}:{self.line}"


@dataclass
class Access:
    """What one source line does to one memory: `requests` of warps, and their cost beside the least possible.

    The cost is 32-byte sectors of global memory, or passes over the banks of shared memory.
    """

    where: str
    line: int
    memory: str
    write: bool
    nbytes: int
    requests: int = 0
    cost: int = 0
    ideal: int = 0


@dataclass
class Report:
    """What a launch did to memory.

    Attributes
    ----------
    accesses : list of Access
        In the order of first execution, one for each line, memory, direction and width.
    shared_bytes : int
        Shared memory of one block, static and dynamic.
    """

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    accesses: list[Access] = field(default_factory=list)

    @property
    def sectors(self) -> int:
        """32-byte sectors moved between global memory and the multiprocessors, caches aside."""
        return sum(a.cost for a in self.accesses if a.memory == "global")

    @property
    def bank_conflicts(self) -> int:
        """Passes over the banks of shared memory beyond those needed."""
        return sum(a.cost - a.ideal for a in self.accesses if a.memory == "shared")

    def table(self) -> str:
        """Return the accesses as text: bytes per thread, requests, and cost per request beside the least possible."""
        lines = [f"{self.kernel}: {self.blocks} blocks of {self.threads} threads, {self.shared_bytes} bytes shared"]
        lines.append(f"{'line':<24}{'memory':<8}{'access':<8}{'bytes':>6}{'requests':>10}{'cost':>8}{'ideal':>8}")
        for a in self.accesses:
            cost, ideal = a.cost / a.requests, a.ideal / a.requests
            does = "write" if a.write else "read"
            lines.append(f"{a.where:<24}{a.memory:<8}{does:<8}{a.nbytes:>6}{a.requests:>10}{cost:>8.2f}{ideal:>8.2f}")
        return "\n".join(lines)


# --- what the log tells ----------------------------------------------------------------------------------------


class Ledger:
    """Reads the logs of all threads at each barrier: races, poison, sectors and bank conflicts."""

    def __init__(self, machine: Any) -> None:
        self._machine = machine
        self._counts: dict[int, np.ndarray] = {}
        self._units: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def settle(self, lanes: list[Any]) -> None:
        """Judge what was done since the last barrier, and forget it."""
        machine = self._machine
        sizes = [len(lane.log) for lane in lanes]
        if not any(sizes):
            return
        entries = np.array([entry for lane in lanes for entry in lane.log], np.int64)
        threads = np.repeat(np.arange(len(lanes)), sizes)
        for lane in lanes:
            lane.log = []
        met = entries == MET
        # How often the warp has met before, counted within each thread.
        starts = np.cumsum([0, *sizes[:-1]])
        before = np.concatenate([[0], np.cumsum(met)])
        turns = before[1:] - np.repeat(before[starts], sizes)
        kept = ~met
        log = _Log(machine.sites, entries[kept], threads[kept], turns[kept])
        self._judge(log.part(log.shared), "shared memory")
        self._judge(log.part(~log.shared), "global memory")
        self._count(log)

    def _judge(self, log: _Log, memory: str) -> None:
        if not log.address.size:
            return
        units = log.units()
        if memory == "shared memory":
            self._check_written(units)
        else:
            self._remember(units)
        warps = units.thread // WARP
        self._refuse(units, units.place, warps, memory)
        extent = int(units.turn.max()) + 1
        if extent > 1:
            self._refuse(units, units.place * extent + units.turn, units.thread, memory, warps)
        else:
            self._refuse(units, units.place, units.thread, memory, warps)

    def _refuse(self, units: _Units, place: np.ndarray, actor: np.ndarray, memory: str, apart: Any = None) -> None:
        """Raise if two actors are at one place and one of them writes."""
        conflict = _conflicts(place, actor, units.write)
        if not conflict.any():
            return
        at = place == place[np.flatnonzero(conflict)[0]]
        writer = np.flatnonzero(at & units.write)[0]
        other = np.flatnonzero(at & (actor != actor[writer]))[0]
        lanes, sites = self._machine.lanes, self._machine.sites
        does = "writes" if units.write[other] else "reads"
        raise RaceError(
            f"{self._machine.place_of(lanes[units.thread[writer]])} writes {memory} at {sites[units.site[writer]]} "
            f"where thread {tuple(lanes[units.thread[other]].threadIdx)} {does} it at {sites[units.site[other]]}, "
            f"with no barrier between"
        )

    def _check_written(self, units: _Units) -> None:
        machine = self._machine
        first = units.place * units.size
        fresh = machine.valid_before.copy()
        for byte in range(units.size):
            fresh[first[(units.kind == WRITE) | (units.kind == ARRIVAL)] + byte] = True
            machine.valid[first[units.kind == WRITE] + byte] = True
        unknown = (units.kind == READ) & ~fresh[first]
        machine.valid_before = machine.valid.copy()
        if unknown.any():
            at = np.flatnonzero(unknown)[0]
            lane, site = machine.lanes[units.thread[at]], machine.sites[units.site[at]]
            raise UninitialisedError(
                f"{machine.place_of(lane, site.code, site.line)}: byte {first[at]} of shared memory is read before it "
                f"is written, or before a copy to it is waited for"
            )

    def _remember(self, units: _Units) -> None:
        """Keep what a block does to global memory: no other block may meet it there."""
        block = self._machine.blockIdx
        number = (block.z * self._machine.grid.y + block.y) * self._machine.grid.x + block.x
        # In units of one byte times its size: intervals may differ in their granularity.
        for byte in range(units.size):
            self._units.append((units.place * units.size + byte, np.full(units.place.size, number), units.write))

    def finish(self) -> None:
        """Refuse blocks that meet in global memory, one of them writing."""
        if self._machine.grid == (1, 1, 1) or not self._units:
            return
        place, block, write = (np.concatenate(parts) for parts in zip(*self._units))
        conflict = _conflicts(place, block, write)
        if conflict.any():
            at = place == place[np.flatnonzero(conflict)[0]]
            blocks = sorted(set(block[at].tolist()))
            first, second = blocks[:2]
            raise RaceError(f"{self._machine.name}: blocks number {first} and {second} write, or write and read, "
                            f"the same place in global memory")  # fmt: skip

    # counting

    def _count(self, log: _Log) -> None:
        requests = log.requests()
        for shared in (True, False):
            chosen = log.shared == shared
            chosen &= log.kind != ARRIVAL
            if chosen.any():
                self._add(log.part(chosen), requests[chosen], shared)

    def _add(self, log: _Log, request: np.ndarray, shared: bool) -> None:
        cost, ideal = (_passes if shared else _sectors)(log, request)
        first = np.unique(request, return_index=True)[1]
        site = log.site[first]
        for number in np.unique(site):
            here = site == number
            counts = np.array([here.sum(), cost[here].sum(), ideal[here].sum()])
            self._counts[int(number)] = self._counts.get(int(number), np.zeros(3, np.int64)) + counts

    def accesses(self) -> list[Access]:
        """Return the counts by line."""
        found: dict[tuple[Any, ...], Access] = {}
        for number in sorted(self._counts):
            site = self._machine.sites[number]
            key = (str(site), site.shared, site.kind == READ, site.nbytes)
            memory = "shared" if site.shared else "global"
            access = found.setdefault(key, Access(str(site), site.line, memory, site.kind != READ, site.nbytes))
            requests, cost, ideal = map(int, self._counts[number])
            access.requests, access.cost, access.ideal = (
                access.requests + requests,
                access.cost + cost,
                access.ideal + ideal,
            )
        return list(found.values())


class _Units(NamedTuple):
    """Accesses cut into pieces of one size: a place is an address over that size."""

    size: int
    place: np.ndarray
    thread: np.ndarray
    turn: np.ndarray
    site: np.ndarray
    kind: np.ndarray
    write: np.ndarray


class _Log:
    """The log of a block since the last barrier, as columns."""

    def __init__(self, sites: list[Site], entries: np.ndarray, thread: np.ndarray, turn: np.ndarray) -> None:
        self.address, self.site = entries >> SITE_BITS, entries & ((1 << SITE_BITS) - 1)
        self.thread, self.turn = thread, turn
        table = np.array([(s.nbytes, s.kind, s.shared) for s in sites])
        self.nbytes, self.kind, shared = table[self.site].T
        self.shared = shared.astype(bool)

    def part(self, chosen: np.ndarray) -> _Log:
        """Return some of the rows."""
        part = object.__new__(_Log)
        for name, column in vars(self).items():
            setattr(part, name, column[chosen])
        return part

    def units(self) -> _Units:
        """Cut accesses into the largest pieces that fit all of them."""
        every = int(np.bitwise_or.reduce(self.address | self.nbytes))
        size = min(every & -every, 16)
        counts = self.nbytes // size
        rows = np.repeat(np.arange(self.address.size), counts)
        steps = np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
        kind = self.kind[rows]
        return _Units(
            size, self.address[rows] // size + steps, self.thread[rows], self.turn[rows], self.site[rows], kind,
            kind != READ,
        )  # fmt: skip

    def requests(self) -> np.ndarray:
        """Number the accesses so that those of a warp's lanes which go together have one number.

        They do if they are the same lane's same-numbered execution of the same instruction: a lane that leaves one out
        is counted with the wrong ones from there to the next barrier.
        """
        order = np.lexsort((np.arange(self.site.size), self.site, self.thread))
        site, thread = self.site[order], self.thread[order]
        new = np.ones(site.size, bool)
        new[1:] = (site[1:] != site[:-1]) | (thread[1:] != thread[:-1])
        starts = np.flatnonzero(new)
        nth = np.arange(site.size) - np.repeat(starts, np.diff([*starts, site.size]))
        occurrence = np.empty_like(nth)
        occurrence[order] = nth
        most = int(nth.max()) + 1
        sites = int(self.site.max()) + 1
        return ((self.thread // WARP) * most + occurrence) * sites + self.site


def _conflicts(place: np.ndarray, actor: np.ndarray, write: np.ndarray) -> np.ndarray:
    """Return which accesses are at a place where another actor is too, and somebody writes."""
    _, where = (
        np.unique(place, return_inverse=True) if place.max() - place.min() > 1 << 22 else (None, place - place.min())
    )
    owner = np.empty(int(where.max()) + 1, np.int64)
    mixed, written = np.zeros((2, owner.size), bool)
    owner[where] = actor
    mixed[where[owner[where] != actor]] = True
    written[where[write]] = True
    return (mixed & written)[where]


def _per_request(request: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return, for each request in ascending order, how many different keys it has."""
    pairs = np.unique(np.stack([request, keys]), axis=1)[0]
    return np.unique(pairs, return_counts=True)[1]


def _sectors(log: _Log, request: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 32-byte sectors that each request touches, and the least that could hold its bytes."""
    cost = _per_request(request, log.address // 32)
    places = _per_request(request, log.address)
    nbytes = log.nbytes[np.unique(request, return_index=True)[1]]
    return cost, -(-places * nbytes // 32)


def _passes(log: _Log, request: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the passes over 32 banks of 4 bytes for each request, and the least that could do.

    A pass serves 32 lanes of 4 bytes, 16 of 8 or 8 of 16; lanes at the same word share it.
    """
    words = np.maximum(log.nbytes // 4, 1)
    rows = np.repeat(np.arange(log.address.size), words)
    step = np.arange(rows.size) - np.repeat(np.cumsum(words) - words, words)
    word = log.address[rows] // 4 + step
    phase = log.thread[rows] % WARP // np.maximum(WARP // words[rows], 1)
    group = request[rows] * WARP + phase
    distinct = np.unique(np.stack([group, word]), axis=1)
    banks, depth = np.unique(np.stack([distinct[0], distinct[1] % 32]), axis=1, return_counts=True)
    groups, first = np.unique(banks[0], return_index=True)
    passes = np.maximum.reduceat(depth, first)
    requests, starts = np.unique(groups // WARP, return_index=True)
    cost = np.add.reduceat(passes, starts)
    ideal = np.add.reduceat(np.ones_like(passes), starts)
    return cost, ideal
