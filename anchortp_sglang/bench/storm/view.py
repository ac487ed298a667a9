"""The display of ``anchortp bench storm``: faults and requests by kind, problems, and the time recoveries took."""

from collections import Counter
from statistics import median
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from anchortp_sglang.bench.storm.run import Report


def summary(report: Report) -> dict[str, Any]:
    """Return all figures as JSON."""
    good = [(request, verdict) for request, verdict in report.judged if request.way != "refused"]
    bad = [verdict for request, verdict in report.judged if request.way == "refused"]
    tfs = sorted(report.tfs_s)
    return {
        "ok": report.ok,
        "servers": report.servers,
        "faults": _faults(report),
        "requests": {kind: dict(counts) for kind, counts in sorted(_requests(report).items())},
        "good_requests": len(good),
        "wrong_answers": sum(verdict.ruling == "wrong" for _, verdict in good),
        "wrong_tokens": sum(verdict.wrong_tokens for _, verdict in good),
        "failed_good_requests": sum(verdict.ruling == "failed" for _, verdict in good),
        "bad_requests": len(bad),
        "bad_requests_not_refused": sum(verdict.ruling != "right" for verdict in bad),
        "polls": report.polls,
        "leaks": report.leaks,
        "problems": report.problems,
        "recoveries": len(tfs),
        "tfs_s": {
            "median": round(median(tfs), 3) if tfs else None,
            "p90": round(tfs[int(0.9 * (len(tfs) - 1))], 3) if tfs else None,
            "max": round(tfs[-1], 3) if tfs else None,
        },
        "wrong": sorted(
            {f"{request.kind}: {verdict.why}" for request, verdict in report.judged if verdict.ruling != "right"}
        ),
    }


def _faults(report: Report) -> dict[str, dict[str, int]]:
    """Count faults by kind and outcome: effect, no effect, no victim."""
    kinds: dict[str, Counter[str]] = {}
    for struck in report.struck:
        outcome = "effect" if struck.effect else "no effect" if struck.failed else "no victim"
        kinds.setdefault(struck.blow.kind, Counter())[outcome] += 1
    return {kind: dict(counts) for kind, counts in sorted(kinds.items())}


def _requests(report: Report) -> dict[str, Counter[str]]:
    kinds: dict[str, Counter[str]] = {}
    for request, verdict in report.judged:
        kinds.setdefault(request.kind, Counter())[verdict.ruling] += 1
    return kinds


def view(figures: dict[str, Any], title: str) -> RenderableType:
    """Make the tables of ``figures``, which ``summary`` returned."""
    faults = _table(f"{title}: faults", figures["faults"], ("effect", "no effect", "no victim"))
    requests = _table("requests", figures["requests"], ("right", "wrong", "failed"))
    tfs = figures["tfs_s"]
    totals = Table(show_header=False)
    for name, value in (
        ("recoveries", figures["recoveries"]),
        ("TFS, median / p90 / longest (s)", f"{tfs['median']} / {tfs['p90']} / {tfs['max']}"),
        (
            "wrong tokens, in answers",
            f"{figures['wrong_tokens']}, in {figures['wrong_answers']} of {figures['good_requests']}",
        ),
        ("good requests that failed", figures["failed_good_requests"]),
        ("bad requests not refused", f"{figures['bad_requests_not_refused']} of {figures['bad_requests']}"),
        ("polls of status, health, metrics", figures["polls"]),
        ("servers", figures["servers"]),
    ):
        totals.add_row(name, str(value))
    wrong = [Text(line, style="red") for line in (*figures["leaks"], *figures["problems"], *figures["wrong"])]
    return Group(faults, requests, totals, *wrong, Text("nothing is wrong" if figures["ok"] else "something is wrong"))


def _table(title: str, rows: dict[str, dict[str, int]], columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for kind, counts in rows.items():
        table.add_row(kind, *(str(counts.get(column, 0)) for column in columns))
    table.add_section()
    table.add_row("all", *(str(sum(counts.get(column, 0) for counts in rows.values())) for column in columns))
    return table
