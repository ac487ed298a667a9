"""Seeded schedules of faults against the coordinator's pure decisions: the state machine and the isolation of requests.

The world is simulated; the decisions are the server's own code. A schedule has requests that arrive and leave, some of
which make ranks fail, faults from outside at any moment, and recovery steps that are slow, fail or are cut off.

Invariants: there is never more than one generation; a recovery ends by its deadline; no open request is forgotten; a
request that ranks can serve is not ended because of another's fault; one that they cannot serve is ended; at the end
every request has been answered.
"""

import heapq
import itertools
import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from anchortp_sglang.recovery.requests.isolation import Evidence, Isolation
from anchortp_sglang.recovery.state_machine import (
    Action,
    Event,
    EventKind,
    Phase,
    State,
    back_off_s,
    budget_is_spent,
    retry_after_s,
    step,
)

DEADLINE_S = 120.0
_HANG_S = 4.0
_STEP_S = 0.05
_END_S = 4000.0

Nature = Literal["good", "raises", "raises_late", "dies", "hangs"]
_POISON: tuple[Nature, ...] = ("raises", "raises_late", "dies", "hangs")


class Violation(AssertionError):
    """A broken invariant. The text names it and the seed that repeats the schedule."""


@dataclass
class Request:
    """A simulated request. ``left``: tokens still to come. ``prefill_s``: from sending it to its first token."""

    rid: str
    nature: Nature
    left: int
    prefill_s: float
    has_tokens: bool = False
    with_ranks_of: int | None = None


@dataclass
class Outcome:
    """Numbers of a schedule's requests by how they ended, and of its generations."""

    finished: int = 0
    left: int = 0
    unservable: int = 0
    fruitless: int = 0
    given_up: int = 0
    generations: int = 1


@dataclass
class World:
    """One schedule and the state of its simulation. Times are simulated seconds."""

    seed: int
    now: float = 0.0
    state: State = field(default_factory=State)
    isolation: Isolation = field(default_factory=Isolation)
    open: dict[str, Request] = field(default_factory=dict)
    outcome: Outcome = field(default_factory=Outcome)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._order = itertools.count()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._generation: int | None = 0  # with live ranks; None between two generations
        self._quiet_from = 0.0  # time of the last fault from outside
        self._checked: int | None = 0  # the last generation whose replay has been checked
        self.log: list[str] = []

    # ---- the schedule

    def run(self) -> Outcome:
        """Play the schedule to its end. Raises Violation."""
        self._plan()
        while self._agenda:
            self.now, _, happen = heapq.heappop(self._agenda)
            if self.now > _END_S:
                self._fail(f"{len(self.open)} requests never ended: {[*self.open.values()][:3]}")
            happen()
            if self.state.phase is Phase.SERVING and self._generation != self._checked:
                self._check_replay()
        if self.open:
            self._fail(f"requests are left open at the end: {list(self.open)}")
        if self.state.phase not in (Phase.SERVING, Phase.DOWN):
            self._fail(f"the schedule ends in phase {self.state.phase}")
        return self.outcome

    def _plan(self) -> None:
        pick = self.random
        burst = pick.choice((0.3, 3.0, 15.0))
        natures: list[Nature] = ["good"] * pick.randrange(1, 9)
        natures += pick.choices(_POISON, k=pick.choice((0, 0, 1, 1, 2)))
        for number, nature in enumerate(natures):
            request = Request(f"r{number}", nature, pick.randrange(1, 20), pick.choice((0.02, 0.2, 2.0)))
            arrives_at = pick.uniform(0.0, burst)
            self._at(arrives_at, lambda request=request: self._arrive(request))  # type: ignore[misc]
            if pick.random() < 0.1:
                leaves_at = arrives_at + pick.uniform(0.0, 3.0)
                self._at(leaves_at, lambda rid=request.rid: self._close(rid, "left"))  # type: ignore[misc]
        self._start_fails = pick.choice((0.0, 0.0, 0.0, 0.05, 0.3, 0.95))
        rhythm = pick.choice((0.0, 0.1, 0.5, 2.0, 5.0))
        at = pick.uniform(0.0, burst)
        for _ in range(pick.choice((0, 1, 3, 20)) if rhythm else 0):
            self._at(at, lambda: self._fault("a rank was killed from outside", Evidence("signal", "a signal")))
            self._quiet_from = max(self._quiet_from, at)
            at += pick.expovariate(1 / rhythm)

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (when, next(self._order), happen))

    def _in(self, seconds: float, happen: Callable[[], None]) -> None:
        self._at(self.now + seconds, happen)

    # ---- requests

    def _arrive(self, request: Request) -> None:
        if self.state.given_up:
            self.outcome.given_up += 1
            return
        self.open[request.rid] = request
        if self.state.phase is Phase.SERVING and self.isolation.admit(request.rid, self.now):
            self._send(request)
        self._release()

    def _send(self, request: Request) -> None:
        generation = request.with_ranks_of = self._generation
        wait_s = _STEP_S if request.has_tokens else request.prefill_s
        self._in(wait_s, lambda: self._step(request, generation, first=True))

    def _step(self, request: Request, generation: int | None, first: bool) -> None:
        """Run the ranks' next step with this request."""
        if generation != self._generation or request.rid not in self.open or self.state.phase is not Phase.SERVING:
            return
        if request.nature == "raises" or (request.nature == "raises_late" and not first):
            return self._fault("a rank failed", Evidence("exception", "a bug", frozenset({request.rid})))
        if request.nature == "dies":
            return self._fault("a rank died", Evidence("signal", "a signal"))
        if request.nature == "hangs":
            return self._in(_HANG_S, lambda: self._hung(generation))
        request.left -= 1
        request.has_tokens = True
        self.isolation.progressed(request.rid, 1, self.now)
        if self.state.fruitless:
            self._advance(Event(EventKind.TOKENS, "tokens"))
        if request.left <= 0:
            self._close(request.rid, "finished")
        else:
            self._in(_STEP_S, lambda: self._step(request, generation, first=False))
        self._release()

    def _hung(self, generation: int | None) -> None:
        if generation == self._generation and self.state.phase is Phase.SERVING:
            self._fault("no progress", Evidence("hang", "a hang", since=self.now - _HANG_S))

    def _close(self, rid: str, how: str) -> None:
        if self.open.pop(rid, None) is not None:
            self.isolation.close(rid)
            setattr(self.outcome, how, getattr(self.outcome, how) + 1)

    def _release(self) -> None:
        if self.state.phase is not Phase.SERVING:
            return
        for rid in self.isolation.release(self.now):
            self._send(self.open[rid])
        wake_at = self.isolation.wake_at(self.now)
        if wake_at is not None:
            self._at(wake_at, self._release)

    # ---- the shell around the machine

    def _fault(self, reason: str, evidence: Evidence) -> None:
        serving = self.state.phase is Phase.SERVING
        if serving and not self.open:
            self._advance(Event(EventKind.TOKENS, "no client waits for a token"))
        self._evidence = evidence
        self._advance(Event(EventKind.FAULT, reason))

    def _advance(self, event: Event) -> None:
        before = self.state
        self.state, action, reason = step(before, event, self.now, DEADLINE_S)
        if action is not Action.NOTHING:
            self.log.append(f"{self.now:9.3f} {before.phase} -> {self.state.phase}: {reason}")
        if action is Action.FENCE:
            self._begin(before)
        elif action is Action.START:
            self._in(back_off_s(self.state) + self._step_time_s(), self._guarded(self._fork))
        elif action is Action.REPLAY:
            self._in(0.001, self._guarded(self._replay))
        elif action is Action.RESUME:
            self._release()
        elif action is Action.GIVE_UP:
            self._give_up()

    def _begin(self, before: State) -> None:
        if before.phase in (Phase.SERVING, Phase.DOWN):
            deadline_at = self.state.deadline_at
            self._at(deadline_at or 0.0, lambda: self._expire(deadline_at))
        if before.phase is Phase.SERVING:
            for rid in self.isolation.struck(self._evidence, self.now):
                if self.open[rid].nature == "good":
                    self._fail(f"{rid} can be served, but was ended as unservable")
                self._close(rid, "unservable")
            if budget_is_spent(self.state, self.now, DEADLINE_S):
                for rid in list(self.open):
                    self._close(rid, "fruitless")
                self._advance(Event(EventKind.TOKENS, "no client waits for a token"))
        self._generation = None
        self._in(0.05, self._guarded(lambda: Event(EventKind.FENCED, "dead and drained")))

    def _expire(self, deadline_at: float | None) -> None:
        if self.state.deadline_at == deadline_at:
            self._advance(Event(EventKind.DEADLINE, "too late"))
        if self.state.deadline_at is not None and self.state.deadline_at <= self.now:
            self._fail("a recovery did not end by its deadline")

    def _guarded(self, work: Callable[[], Event | None]) -> Callable[[], None]:
        attempt = self.state.attempt

        def report() -> None:
            if self.state.attempt == attempt and (event := work()) is not None:
                self._advance(replace(event, attempt=attempt))

        return report

    def _step_time_s(self) -> float:
        return self.random.choice((0.2, 0.2, 0.2, 0.3, 1.0, 30.0)) if self.now <= self._quiet_from else 0.2

    def _fork(self) -> Event | None:
        if self.state.phase is not Phase.STARTING:
            return None
        if self.now <= self._quiet_from + 30 * (self._start_fails > 0) and self.random.random() < self._start_fails:
            failure = self.random.choice(("out of memory", ""))
            return Event(EventKind.ABORTED, failure or "another process died", failure=failure)
        if self._generation is not None:
            self._fail("two generations exist at the same time")
        self._generation = self.outcome.generations
        self.outcome.generations += 1
        return Event(EventKind.STARTED, "ready")

    def _replay(self) -> Event:
        self.isolation.replay([(rid, request.has_tokens) for rid, request in self.open.items()], self.now)
        return Event(EventKind.REPLAYED, "replayed")

    def _give_up(self) -> None:
        self._generation = None
        for rid in list(self.open):
            self._close(rid, "given_up")
        self._in(retry_after_s(self.state), lambda: self._advance(Event(EventKind.RETRY, "again")))

    # ---- what must hold

    def _check_replay(self) -> None:
        self._checked = self._generation
        waiting = self.isolation.waiting
        running = {rid for rid, request in self.open.items() if request.with_ranks_of == self._generation}
        if (
            len(waiting) != len(set(waiting))
            or running.intersection(waiting)
            or {*waiting, *running} != self.open.keys()
        ):
            self._fail(f"requests open: {list(self.open)}, with the ranks: {running}, waiting: {waiting}")

    def _fail(self, what: str) -> None:
        raise Violation(f"seed {self.seed}: {what}\n" + "\n".join(self.log[-40:]))


def play(seeds: range) -> tuple[dict[str, int], list[str]]:
    """Play the schedules of all seeds on all processors. Return the summed outcomes and the violations' texts."""
    sums: Counter[str] = Counter()
    violations: list[str] = []
    with multiprocessing.Pool(len(os.sched_getaffinity(0))) as pool:
        for outcome in pool.imap_unordered(_play_one, seeds, chunksize=500):
            if isinstance(outcome, str):
                violations.append(outcome)
            else:
                sums.update(asdict(outcome))
    return dict(sums), violations


def _play_one(seed: int) -> Outcome | str:
    try:
        return World(seed).run()
    except Violation as violation:
        return str(violation)
