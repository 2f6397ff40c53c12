"""Interleaved timing: every candidate once per round, ratios within the round, medians over the rounds.

A machine's speed drifts (frequency, other users, sleeping worker threads), so times taken minutes apart cannot be
compared. Therefore candidates are interleaved, and a speed-up is the median of the ratios of neighbouring samples.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

__all__ = ["QUICK", "Budget", "Timing", "interleave", "percentile", "ratios"]


def percentile(values: list[float], q: float) -> float:
    """The q-th percentile (0..100), linear between neighbours."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass
class Timing:
    """Seconds per call, one sample per round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p20(self) -> float:
        return percentile(self.seconds, 20)

    @property
    def p80(self) -> float:
        return percentile(self.seconds, 80)


@dataclass(frozen=True)
class Budget:
    """How long to measure: at least `rounds` rounds and `seconds` seconds, but no more than `limit` seconds
    once three rounds are done. A sample repeats the call until it takes `sample` seconds."""

    rounds: int = 7
    seconds: float = 2.0
    limit: float = 90.0
    sample: float = 0.02
    warmup: float = 0.2

    def enough(self, rounds: int, elapsed: float) -> bool:
        if rounds >= min(3, self.rounds) and elapsed >= self.limit:
            return True
        return rounds >= self.rounds and elapsed >= self.seconds


QUICK = Budget(rounds=3, seconds=0.3, limit=20.0, sample=0.005, warmup=0.05)


def _clock_cpu(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def _clock_cuda(call: Callable[[], object], count: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000.0


def _warm_up(call: Callable[[], object], clock: Callable[[Callable[[], object], int], float], seconds: float) -> float:
    """Run for `seconds`; returns the shortest time of a call, without the first unless that alone takes much longer."""
    first = clock(call, 1)
    if seconds and first > 4 * seconds:
        return first
    best, spent = float("inf"), 0.0
    while spent < seconds:
        once = clock(call, 1)
        best, spent = min(best, once), spent + once
    return max(best, 1e-9)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    device: str = "cpu",
    budget: Budget | None = None,
    settle: Mapping[str, float] | None = None,
    on_sample: Callable[[str, int], None] | None = None,
    clock: Callable[[Callable[[], object], int], float] | None = None,
) -> dict[str, Timing]:
    """Time the calls in turns. The order rotates, so that no candidate always follows the same one.

    settle: seconds to wait after a candidate whose own worker threads keep spinning for a while: they would slow the
    next candidate. on_sample(name, round) is for progress; clock replaces the clock in tests.
    """
    budget = budget or Budget()
    settle = settle or {}
    clock = clock or (_clock_cuda if device == "cuda" else _clock_cpu)
    counts = {}
    for name, call in calls.items():
        counts[name] = max(1, min(10_000, round(budget.sample / _warm_up(call, clock, budget.warmup))))
        time.sleep(settle.get(name, 0.0))
    timings = {name: Timing() for name in calls}
    names = list(calls)
    start, done = time.perf_counter(), 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        while not budget.enough(done, time.perf_counter() - start):
            turn = done % len(names)
            for name in names[turn:] + names[:turn]:
                if on_sample:
                    on_sample(name, done)
                call, count = calls[name], counts[name]
                if count > 1:
                    clock(call, 1)  # wakes the worker threads and refills the caches after the previous candidate
                timings[name].seconds.append(clock(call, count) / count)
                time.sleep(settle.get(name, 0.0))
            done += 1
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return timings


def ratios(peer: Timing, candidate: Timing) -> Timing:
    """Speed-up of `candidate` over `peer`, round by round."""
    return Timing([p / c for p, c in zip(peer.seconds, candidate.seconds, strict=True)])
