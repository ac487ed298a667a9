"""The arguments of the Serve application, as a config file or ``serve run`` gives them."""

import itertools
import shlex
from collections.abc import Mapping
from typing import Any

import msgspec


class ConfigError(ValueError):
    """Arguments that no fleet can be made of; the text is for the operator."""


class Autoscale(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Between how many servers Serve scales, and how many open requests of each it aims at."""

    min: int = 1
    max: int = 2
    target_open: float = 16.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.max:
            raise ValueError("autoscale: 1 <= min <= max")
        if self.target_open <= 0:
            raise ValueError("autoscale: target_open is above 0")


class FleetConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The arguments of a fleet: its model, servers and ingresses.

    ``arguments``: further flags of ``anchortp_sglang.launch_server``, as a list or as one string. ``gpus``, ``cpus``:
    what Ray reserves for a server; by default a GPU for each device, or with ``--device cpu`` a CPU for each.
    ``resources``, ``ingress_resources``: Ray's custom resources, for servers and ingresses that belong on some nodes.
    ``per_node``: servers on one node, at most. ``drain_s``: time for which a server that is taken out finishes what
    it has; then its streams go on elsewhere. ``environment``: of the servers. ``version``: change it to have the
    servers replaced, for new weights in the same place for instance.
    """

    model_path: str
    tp_size: int = 1
    replicas: int = 2
    ingresses: int = 2
    autoscale: Autoscale | None = None
    arguments: list[str] | str = []
    gpus: float | None = None
    cpus: float | None = None
    resources: dict[str, float] = {}
    ingress_resources: dict[str, float] = {}
    per_node: int | None = None
    drain_s: float = 30.0
    start_timeout_s: float = 1800.0
    environment: dict[str, str] = {}
    version: str = ""

    def __post_init__(self) -> None:
        for name in ("tp_size", "replicas", "ingresses"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1")
        if self.drain_s < 0 or self.start_timeout_s <= 0:
            raise ValueError("drain_s is not negative, start_timeout_s is above 0")
        own = {"--host", "--port", "--model-path", "--tp-size", "--tp", "--nnodes", "--node-rank", "--dist-init-addr"}
        given = own.intersection(flag.partition("=")[0] for flag in self.flags)
        if given:
            raise ValueError(f"arguments has {', '.join(sorted(given))}, which the fleet sets or does not support")

    @property
    def flags(self) -> list[str]:
        """Return ``arguments`` as a list."""
        return shlex.split(self.arguments) if isinstance(self.arguments, str) else list(self.arguments)

    def flag(self, name: str) -> str | None:
        """Return the value of a flag in ``arguments``, the last one's, or None."""
        flags, value = self.flags, None
        for one, following in itertools.pairwise([*flags, None]):
            if one == name:
                value = following
            elif one is not None and one.startswith(f"{name}="):
                value = one.partition("=")[2]
        return value

    @property
    def on_cpus(self) -> bool:
        return self.flag("--device") == "cpu"

    @property
    def max_body_bytes(self) -> int:
        """Return the longest body that the servers take; the ingress reads no more."""
        return int(float(self.flag("--anchor-max-body-mib") or 64) * 2**20)

    @property
    def model(self) -> str:
        """Return what a stream may not change: the model and the flags that may give other tokens."""
        return f"{self.model_path} {self.version}".strip()

    def actor_options(self) -> dict[str, Any]:
        """Return what Ray reserves for a server, all of it on one node: a TP group spans no hosts."""
        gpus = self.gpus if self.gpus is not None else 0.0 if self.on_cpus else float(self.tp_size)
        cpus = self.cpus if self.cpus is not None else float(self.tp_size) if self.on_cpus else 1.0
        return {"num_gpus": gpus, "num_cpus": cpus, "resources": dict(self.resources)}


def read(args: Mapping[str, Any]) -> FleetConfig:
    """Read the application's arguments; numbers may be strings, as on ``serve run``'s command line.

    Raises ConfigError.
    """
    try:
        return msgspec.convert(dict(args), FleetConfig, strict=False)
    except (msgspec.ValidationError, ValueError) as error:
        known = ", ".join(FleetConfig.__struct_fields__)
        raise ConfigError(f"the fleet's args: {error}; known: {known}") from None
