"""What promtool's linter demands of a /metrics text, and a little more, with prometheus_client's parser."""

import re
from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

_NAME = re.compile(r"^[a-z][a-z0-9_]*$")
_ABBREVIATED = {"s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "bytes_per_sec"}
_OTHER_UNITS = {"milliseconds", "microseconds", "minutes", "hours", "kilobytes", "megabytes", "gigabytes", "percent"}


def only(text, prefix):
    """The lines of those families whose name begins with ``prefix``."""
    bare = {line: line.removeprefix("# HELP ").removeprefix("# TYPE ") for line in text.splitlines()}
    kept = [line for line, name in bare.items() if name.startswith(prefix)]
    return "\n".join(kept) + "\n"


def problems(text):
    """What is wrong with the families of ``text``; empty if nothing is."""
    found = []
    families = list(text_string_to_metric_families(text))
    found += [f"{name}: declared {times} times" for name, times in _declared(text).items() if times > 1]
    for family in families:
        name, parts = family.name, set(family.name.split("_"))
        if not _NAME.match(name):
            found.append(f"{name}: not snake case")
        if not family.documentation.strip().endswith("."):
            found.append(f"{name}: no help text, or no sentence")
        if family.type == "unknown":
            found.append(f"{name}: no type")
        if parts & (_ABBREVIATED | _OTHER_UNITS):
            found.append(f"{name}: units are seconds and bytes, spelled out")
        if family.type == "counter" and not all(s.name.endswith("_total") for s in family.samples):
            found.append(f"{name}: a counter ends in _total")
        if family.type != "counter" and name.endswith(("_total", "_count", "_sum", "_bucket")):
            found.append(f"{name}: a {family.type} must not end so")
        if not family.samples:
            found.append(f"{name}: no sample")
        series = Counter((s.name, tuple(sorted(s.labels.items()))) for s in family.samples)
        found += [f"{key}: {times} samples of one series" for key, times in series.items() if times > 1]
        labels = {label for s in family.samples for label in s.labels}
        found += [f"{name}: label {label}" for label in labels & {"pid", "instance", "job"}]
        if family.type == "histogram":
            found += _buckets(family)
    return found


def _declared(text):
    return Counter(line.split()[2] for line in text.splitlines() if line.startswith("# TYPE"))


def _buckets(family):
    rows = {}
    for sample in family.samples:
        if sample.name.endswith("_bucket"):
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "le"))
            rows.setdefault(labels, []).append((float(sample.labels["le"]), sample.value))
    for labels, row in rows.items():
        counts = [count for _, count in sorted(row)]
        if counts != sorted(counts):
            yield f"{family.name}{labels}: buckets do not accumulate"
        if max(le for le, _ in row) != float("inf"):
            yield f"{family.name}{labels}: no +Inf bucket"


def value(text, name, **labels):
    """The one sample of this name with exactly these labels."""
    samples = [s for f in text_string_to_metric_families(text) for s in f.samples if s.name == name]
    (found,) = [s.value for s in samples if s.labels == labels]
    return found
