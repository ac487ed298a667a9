"""``anchortp bench storm``: a mixed load and seeded faults of every kind, until the schedule is done.

Each client's answer is compared with the answer before the first fault, and what the quiet server holds at the end with
what it held before. A server that is too narrow for another loss takes its devices back; one that no longer serves is
replaced by a new one.
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from anchortp_sglang.bench.storm.calm import UNANSWERED, is_calm, is_up, state_of, within
from anchortp_sglang.bench.storm.clients import Clients, Exchange, call, read_whole, send, send_all
from anchortp_sglang.bench.storm.faults import Struck, release, strike
from anchortp_sglang.bench.storm.judge import RIGHT, Answer, Verdict, judge
from anchortp_sglang.bench.storm.leaks import settled
from anchortp_sglang.bench.storm.log import Schedule
from anchortp_sglang.bench.storm.requests import Request
from anchortp_sglang.bench.storm.schedule import Burst
from anchortp_sglang.testing.process_tree import Tree
from anchortp_sglang.testing.server import Server, ServerFailed

Progress = Callable[[str], None]
Log = Callable[[dict[str, Any]], None]

HANG_TIMEOUT_S = 4.0
RECOVERY_DEADLINE_S = 40.0
FLAGS = (
    *("--device", "cpu", "--dtype", "float32", "--chunked-prefill-size", "128", "--enable-metrics"),
    *("--anchor-hang-timeout", f"{HANG_TIMEOUT_S:g}", "--anchor-recovery-deadline", f"{RECOVERY_DEADLINE_S:g}"),
)
_POLL_TIMEOUT_S = RECOVERY_DEADLINE_S + 5.0
"""Limit for routes that only look: some ask the ranks, and wait for a recovery that is under way."""
_REQUEST_TIMEOUT_S = 120.0
_PATIENCE_S = 30.0
"""No fault strikes while a client has waited longer. On a slow machine an answer that is not streamed might otherwise
never end: each recovery begins it anew, as main has no tokens of it (SGLang's SGLANG_FORCE_STREAM_INTERVAL)."""
_REFUSAL_TIMEOUT_S = 15.0
_CALM_TIMEOUT_S = 60.0
_MIN_WIDTH = 2
_SAMPLED = 4
"""A later server gets only every fourth request before its storm."""
_POLLED_ROUTES = ("/anchortp/status", "/health", "/metrics", "/server_info", "/v1/models")


@dataclass
class Report:
    """A storm's report. ``judged``: (request, its verdict). ``tfs_s``: one for each recovery."""

    servers: int = 0
    struck: list[Struck] = field(default_factory=list)
    judged: list[tuple[Request, Verdict]] = field(default_factory=list)
    polls: int = 0
    tfs_s: list[float] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        if self.leaks or self.problems or any(struck.failed for struck in self.struck):
            return False
        return all(verdict == RIGHT for _, verdict in self.judged)


class Storm:
    """One load over several servers in turn, judged by the first server's unbroken answers.

    ``limit_s``: seconds after which it ends, even if faults are left.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        seed: int,
        clients: int,
        log: Log,
        progress: Progress,
        limit_s: float = math.inf,
    ) -> None:
        self.report = Report()
        self._ends_at = time.monotonic() + limit_s
        self._requests = list(requests)
        self._seed, self._clients, self._log, self._progress = seed, clients, log, progress
        self._expected: list[Answer] | None = None

    def run_on(self, tree: Tree, bursts: deque[Burst]) -> None:
        """Storm one quiet server until it is worn out or ``bursts`` is empty.

        Raises ServerFailed if a request fails before the first fault.
        """
        self.report.servers += 1
        server = tree.server
        self._unbroken(server)
        server.flush_cache()
        before, first = settled(tree), len(self.report.struck)
        seen = {each["generation"] for each in server.status()["recoveries"]}
        seed = self._seed + 1000 * self.report.servers
        polled, timeouts = self._polled(server), (_REQUEST_TIMEOUT_S, _POLL_TIMEOUT_S)
        with Clients(server.url, self._requests, seed, self._clients, polled, *timeouts) as clients:
            fit = True
            while bursts and fit and not self.is_over():
                fit = self._survives(tree, clients, bursts.popleft())
                self._note_recoveries(server, seen)
        self._judge(clients)
        for struck in self.report.struck[first:]:
            release(struck.pids)
        if fit or is_up(server):
            self._find_leaks(tree, before)

    def is_over(self) -> bool:
        return time.monotonic() > self._ends_at

    def _unbroken(self, server: Server) -> None:
        good = [each for each in self._requests if each.way != "refused"]
        if self._expected is not None:  # a later server must give the same answers
            good, expected = good[::_SAMPLED], self._expected[::_SAMPLED]
            answers = send_all(server.url, good, _REQUEST_TIMEOUT_S)
            judged = map(judge, map(read_whole, good), expected, answers)
            self.report.judged += zip(good, judged, strict=True)
            return
        self._progress(f"recording the answers to {len(good)} requests before any fault")
        answers = send_all(server.url, good, _REQUEST_TIMEOUT_S)
        for each, answer in zip(good, answers, strict=True):
            if answer.error is not None or not answer.ended:
                raise ServerFailed(f"a request ({each.kind}) failed before any fault: {answer.code} {answer.error}")
        self._expected = answers
        refused = [each for each in self._requests if each.way == "refused" and self._is_refused(server, each)]
        self._requests = good + refused

    def _is_refused(self, server: Server, bad: Request) -> bool:
        """Return whether the quiet server refuses the request without a recovery; if not, report it."""
        generation = server.status()["generation"]
        exchange = Exchange(0, time.monotonic())
        send(server.url, bad, exchange, "", 0, _REFUSAL_TIMEOUT_S)
        verdict = judge(bad, None, exchange.answer)
        status = server.wait_serving(generation, _CALM_TIMEOUT_S)
        if status["generation"] != generation:
            verdict = Verdict("failed", f"a bad request caused a recovery ({verdict.why})")
        if verdict != RIGHT:
            self._problem(f"{bad.kind}: {verdict.why}; {json.dumps(bad.body)[:200]}")
        return verdict == RIGHT

    def _polled(self, server: Server) -> list[str]:
        """Return the routes an operator looks at that answer; /metrics may be off."""
        codes = {path: call(server.url, "GET", path, None, _REFUSAL_TIMEOUT_S)[0] for path in _POLLED_ROUTES}
        for path, code in codes.items():
            if code not in (200, 404):
                self._problem(f"{path} answers {code} although no fault is under way")
        return [path for path, code in codes.items() if code == 200]

    def _survives(self, tree: Tree, clients: Clients, burst: Burst) -> bool:
        """Strike once clients are being served. Return whether the server can take another burst."""
        if not within(_CALM_TIMEOUT_S, lambda: clients.open_streams() > 0 and clients.longest_wait_s() < _PATIENCE_S):
            return self._problem(f"clients are not served: one has waited for {clients.longest_wait_s():.0f} s")
        time.sleep(burst.rest_s)
        self._log({"burst": burst.number})
        kinds = ", ".join(blow.kind for blow in burst.blows)
        self._progress(f"server {self.report.servers}, burst {burst.number}: {kinds}")
        try:
            dealt = list(self._blows(tree, burst))
        except UNANSWERED as error:
            return self._problem(f"{kinds}: the server does not answer: {error}")
        moment = time.monotonic()
        calm = partial(is_calm, tree, clients, dealt, moment)
        if not within(_CALM_TIMEOUT_S, calm):
            return self._problem(f"{kinds}: not serving {_CALM_TIMEOUT_S:g} s later: {state_of(tree.server)}")
        return int(tree.server.status()["tp_size"]) > _MIN_WIDTH or self._grows(tree.server)

    def _grows(self, server: Server) -> bool:
        """Have a narrow server take all its devices back; return whether it did."""
        devices = [device["id"] for device in server.status()["devices"]]
        self._progress(f"server {self.report.servers}: all devices are taken back")
        try:
            server.post("/anchortp/reconfigure", {"devices": devices}, _CALM_TIMEOUT_S)
        except UNANSWERED as error:
            return self._problem(f"lost devices were not taken back: {error}")
        return True

    def _blows(self, tree: Tree, burst: Burst) -> Any:
        for blow in burst.blows:
            time.sleep(blow.after_s)
            struck = strike(tree, blow)
            self.report.struck.append(struck)
            self._log({"struck": struck.to_json()})
            yield struck

    def _note_recoveries(self, server: Server, seen: set[int]) -> None:
        for each in server.status()["recoveries"] if is_up(server) else ():
            if each["generation"] not in seen and (each["tfs_s"] is not None or each["failed"]):
                seen.add(each["generation"])
                if each["failed"]:
                    self._problem(f"recovery {each['generation']} failed: {each['failed']}")
                else:
                    self.report.tfs_s.append(each["tfs_s"])

    def _judge(self, clients: Clients) -> None:
        assert self._expected is not None
        for each in clients.exchanges:
            request = self._requests[each.number]
            expected = self._expected[each.number] if request.way != "refused" else None
            verdict = judge(request, expected, each.answer)
            if each.ended_at is None:
                verdict = Verdict("failed", f"the answer has not ended after {each.latency_s:.0f} s")
            if verdict != RIGHT:
                body = json.dumps(request.body)[:200]
                self._log({"verdict": verdict.ruling, "kind": request.kind, "why": verdict.why, "body": body})
            self.report.judged.append((request, verdict))
        self.report.polls += clients.polls
        self.report.problems += clients.polls_failed

    def _find_leaks(self, tree: Tree, before: Any) -> None:
        try:
            tree.server.flush_cache()
            self._polled(tree.server)  # /metrics puts the series of the dead together
            leaked = before.leaked(settled(tree, before))
        except UNANSWERED as error:
            self._problem(f"leaks could not be checked, as the server does not answer: {error}")
            return
        self.report.leaks += leaked
        for each in leaked:
            self._log({"leak": each})

    def _problem(self, text: str) -> bool:
        self.report.problems.append(text)
        self._log({"problem": text})
        self._progress(text)
        return False


def run(
    model: Path, schedule: Schedule, slots: int, storm: Storm, folder: Path, logs: str, progress: Progress
) -> Report:
    """Run the schedule on as many servers as it wears out. Their logs are files that begin with ``logs``.

    Raises ServerFailed if a server does not start.
    """
    left = deque(schedule.bursts)
    overlap = "on" if schedule.overlap else "off"
    while left and not storm.is_over():
        number = storm.report.servers
        place = folder / f"s{number}"
        place.mkdir()
        env = {"TMPDIR": str(place), "XDG_RUNTIME_DIR": str(place)}
        flags = (*FLAGS, "--max-total-tokens", str(slots), "--anchor-overlap", overlap)
        progress(f"starting a server with TP={schedule.tp_size}")
        with Server(model, schedule.tp_size, *flags, log=Path(f"{logs}-server-{number}.log"), env=env) as server:
            storm.run_on(Tree(server, place), left)
    return storm.report
