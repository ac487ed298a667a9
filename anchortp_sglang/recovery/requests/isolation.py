"""Decides which open requests go to a new generation, and when; isolates requests that ranks keep dying with.

A replay is a hypothesis. A request that was with the ranks in two faults in a row, and got next to no tokens, is a
suspect: it waits until the others go on, and is then tried in groups that halve with each further fault, until one is
left. A fault while no other request can have been the cause convicts it; after some convictions it is ended.

An exception of a rank, or a hang, means that the request cannot be served. A death by signal may have come from
outside: then convictions count only if the ranks survived without the request in between, for longer and longer.

Pure: ``now`` is in seconds of any one clock.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

SUSPECT_STRIKES = 2
PROOF_TOKENS = 8
"""New tokens that prove that ranks can serve a request; so does one token and ``PROOF_S`` without a fault."""
PROOF_S = 2.0
PATIENCE_S = 0.5
"""Time that requests that must be prefilled wait for those that only go on."""
TRIAL_S = 2.0
"""Time that suspects wait for the proof of others. Where one is tried alone, new requests wait for its proof."""
QUARANTINE_LIMIT_S = 10.0
CONTROL_S = (0.0, 1.0, 2.0, 4.0, 8.0)
"""Time that ranks must survive without a request before it is tried again, by the number of its convictions; also at
least ``CONTROL_RATIO`` times as long as they took to die with it. Otherwise faults from outside could convict it."""
CONTROL_RATIO = 4.0
CONTROL_LIMIT_S = 30.0
CONVICTIONS = {"exception": 2, "hang": 2, "signal": len(CONTROL_S)}

Kind = Literal["exception", "hang", "signal"]


@dataclass(frozen=True)
class Evidence:
    """Evidence of a fault's cause. ``rids``: requests named by a rank's exception; ``text``: the exception's.

    ``since``: when the ranks last made progress, if they hang: a request sent to them later cannot be the cause.
    """

    kind: Kind
    text: str
    rids: frozenset[str] = frozenset()
    since: float | None = None


@dataclass
class Case:
    """The case of a request that ranks have not proven they can serve.

    ``strikes``: faults in a row that it was part of. ``convictions``: those of them without another possible cause.
    ``sent_at``: when it was given to the ranks of this generation, None if it was not. ``tokens``: new ones since.
    """

    strikes: int = 0
    convictions: int = 0
    sent_at: float | None = None
    first_token_at: float | None = None
    tokens: int = 0
    died_after_s: float = 0.0

    def proven(self, now: float) -> bool:
        """Return whether ranks have served it long enough."""
        if self.tokens >= PROOF_TOKENS:
            return True
        return self.first_token_at is not None and now - self.first_token_at >= PROOF_S

    def withdraw(self) -> None:
        """Note that no rank has it any more."""
        self.sent_at, self.first_token_at, self.tokens = None, None, 0


class Isolation:
    """Decides the order of replays. ``waiting``: open requests that are not with the ranks, in order."""

    def __init__(self) -> None:
        self._cases: dict[str, Case] = {}
        self._going_on: list[str] = []
        self._new: list[str] = []
        self._suspects: list[str] = []
        self._first: set[str] = set()
        """Requests of this replay that the others wait for."""
        self._trial: set[str] = set()
        self._group = 0
        self._began = 0.0
        self._released_at = 0.0
        self._quarantine_until = 0.0

    @property
    def waiting(self) -> list[str]:
        return [*self._going_on, *self._new, *self._suspects]

    @property
    def suspects(self) -> int:
        """Number of open requests that are suspects now."""
        return sum(case.strikes >= SUSPECT_STRIKES for case in self._cases.values())

    def admit(self, rid: str, now: float) -> bool:
        """Take in a new request; True if it may go to the ranks at once, else ``release`` names it later."""
        self.close(rid)  # of an earlier request of that name, which has ended
        if self._new or self._quarantined(now):
            self._new.append(rid)
            return False
        self._cases[rid] = Case(sent_at=now)
        return True

    def progressed(self, rid: str, tokens: int, now: float) -> None:
        """Note new tokens of a request."""
        case = self._cases.get(rid)
        if case is None or case.sent_at is None:
            return
        case.tokens += tokens
        if case.first_token_at is None:
            case.first_token_at = now
            self._first.discard(rid)
        if case.proven(now):
            self._acquit(rid)

    def close(self, rid: str) -> None:
        """Forget a request that is no longer open."""
        self._acquit(rid)
        for queue in (self._going_on, self._new, self._suspects):
            if rid in queue:
                queue.remove(rid)

    def _acquit(self, rid: str) -> None:
        self._cases.pop(rid, None)
        self._first.discard(rid)
        if rid in self._trial:
            self._trial.discard(rid)
            if not self._trial:
                self._group *= 2
                self._quarantine_until = 0.0

    # ---- faults

    def struck(self, evidence: Evidence, now: float) -> dict[str, str]:
        """Judge a fault of a serving generation; return rid -> reason of the requests to end.

        The ranks are dead: no request is with them until ``replay``.
        """
        self._acquit_proven(now)
        present = {rid: case for rid, case in self._cases.items() if _may_be_cause(case, evidence)}
        named = evidence.rids.intersection(self._cases) | self._renamed(evidence, now)
        for case in present.values():
            case.strikes += 1
            case.died_after_s = max(case.died_after_s, now - (case.sent_at or now))
        for rid in named:
            self._cases[rid].strikes = max(self._cases[rid].strikes, SUSPECT_STRIKES)
        alone = self._alone(present, named, evidence.since or now)
        if alone is not None:
            self._cases[alone].convictions += 1
        elif evidence.kind == "signal" and not named and not self._trial & present.keys():
            # The ranks died without a suspect on trial: the cause may have been another one each time.
            for case in self._cases.values():
                case.convictions = 0
        self._group = max(1, len(self._trial & present.keys() or present) // 2)
        self._trial.clear()
        for case in self._cases.values():
            case.withdraw()
        if alone is None or self._cases[alone].convictions < CONVICTIONS[evidence.kind]:
            return {}
        return {alone: _verdict(self._cases[alone].convictions, evidence)}

    def _acquit_proven(self, now: float) -> None:
        for rid in [rid for rid, case in self._cases.items() if case.sent_at is not None and case.proven(now)]:
            self._acquit(rid)

    def _renamed(self, evidence: Evidence, now: float) -> set[str]:
        """Watch again those requests that an exception names although they were proven. Return their rids."""
        new = evidence.rids.difference(self._cases)
        self._cases |= {rid: Case(strikes=SUSPECT_STRIKES, sent_at=now) for rid in new}
        return set(new)

    def _alone(self, present: dict[str, Case], named: Collection[str], stuck_at: float) -> str | None:
        """Return the suspect on trial that alone can have caused the fault.

        That is the only request that was there or was named. Or it is the one sent last, if the ranks had lived with
        all others for long and died right after it: some need long for their first token, and cannot prove themselves.
        """
        for blamed in (named, present):
            if len(blamed) == 1 and (rid := next(iter(blamed))) in self._trial:
                return rid
        by_time = sorted(present, key=lambda rid: present[rid].sent_at or 0.0)
        if named or len(by_time) < 2 or by_time[-1] not in self._trial:
            return None
        last, before = (present[rid].sent_at or 0.0 for rid in (by_time[-1], by_time[-2]))
        return by_time[-1] if last - before >= TRIAL_S and stuck_at - last <= TRIAL_S else None

    # ---- the next generation

    def replay(self, requests: Iterable[tuple[str, bool]], now: float) -> None:
        """Queue all open requests, in order, for a generation that begins to serve.

        ``requests``: each one's rid, and whether it has tokens already. Those go first, as retained KV lets them go on
        in one step. Requests that must be prefilled follow, then suspects. ``release`` says when each is sent.
        """
        self._began = self._released_at = now
        self._quarantine_until = 0.0
        self._going_on, self._new, self._suspects = [], [], []
        self._first.clear()
        self._trial.clear()
        order = []
        for rid, has_tokens in requests:
            case = self._cases.get(rid)
            if case is not None:
                case.withdraw()
            if case is not None and case.strikes >= SUSPECT_STRIKES:
                order.append((case.convictions, case.strikes, rid))
            else:
                (self._going_on if has_tokens else self._new).append(rid)
        self._suspects = [rid for _, _, rid in sorted(order, key=lambda entry: entry[:2])]

    def release(self, now: float) -> list[str]:
        """Return the requests that go to the ranks now, in order. Call it again after progress, and at ``wake_at``."""
        released = self._send(self._going_on, now, waited_for=True)
        if self._new and self._may_prefill(now):
            released += self._send(self._new, now, waited_for=bool(self._suspects))
        if self._suspects and self._may_try(now):
            released += self._try(now)
        return released

    def wake_at(self, now: float) -> float | None:
        """Return when time alone may release more; None if no request waits."""
        if not self._new and not self._suspects:
            return None
        limits = [self._began + PATIENCE_S, self._released_at + TRIAL_S, self._quarantine_until]
        if self._suspects:
            limits.append(self._control_until())
        return min((limit for limit in limits if limit > now), default=now + PATIENCE_S)

    def _send(self, queue: list[str], now: float, waited_for: bool) -> list[str]:
        sent, queue[:] = list(queue), []
        for rid in sent:
            self._cases.setdefault(rid, Case()).sent_at = now
        if waited_for:
            self._first.update(sent)
        if sent:
            self._released_at = now
        return sent

    def _may_prefill(self, now: float) -> bool:
        return not self._quarantined(now) and (not self._first or now >= self._began + PATIENCE_S)

    def _may_try(self, now: float) -> bool:
        """Return whether suspects may be tried: all others have proven themselves, or had the time for it."""
        if self._going_on or now < self._control_until():
            return False
        if self._next_is_alone() and not self._trial and not self._new and not self._quarantined(now):
            longest_s = TRIAL_S + 2 * self._cases[self._suspects[0]].died_after_s
            self._quarantine_until = now + TRIAL_S + min(longest_s, QUARANTINE_LIMIT_S)
        if self._new and not self._quarantined(now):
            return False
        unproven = [case for case in self._cases.values() if case.sent_at is not None and not case.proven(now)]
        patience_s = max([TRIAL_S, *(1.5 * case.died_after_s for case in unproven)])  # one may die later than after 2 s
        return not unproven or now >= self._released_at + min(patience_s, QUARANTINE_LIMIT_S)

    def _next_is_alone(self) -> bool:
        return self._group <= 1 or bool(self._cases[self._suspects[0]].convictions)

    def _control_until(self) -> float:
        case = self._cases[self._suspects[0]]
        if not case.convictions:
            return self._began
        survived_s = max(CONTROL_S[min(case.convictions, len(CONTROL_S) - 1)], CONTROL_RATIO * case.died_after_s)
        return self._began + min(survived_s, CONTROL_LIMIT_S)

    def _try(self, now: float) -> list[str]:
        """Send the next group of suspects; a convicted one goes alone."""
        clean = [rid for rid in self._suspects if not self._cases[rid].convictions]
        group = clean[: max(1, self._group)] or self._suspects[:1]
        self._suspects = [rid for rid in self._suspects if rid not in group]
        self._trial.update(group)
        return self._send(group, now, waited_for=False)

    def _quarantined(self, now: float) -> bool:
        return now < self._quarantine_until and bool(self._trial or self._suspects)


def _may_be_cause(case: Case, evidence: Evidence) -> bool:
    return case.sent_at is not None and (evidence.since is None or case.sent_at <= evidence.since)


def _verdict(convictions: int, evidence: Evidence) -> str:
    return (
        f"this request was ended: ranks failed {convictions} times while no other request can have been the cause, "
        f"the last time with {evidence.text}"
    )
