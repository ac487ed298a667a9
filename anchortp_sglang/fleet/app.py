"""The Serve application: ``serve run anchortp_sglang.fleet.app:build model_path=… tp_size=…``, or a config file."""

from collections.abc import Mapping
from typing import Any

try:
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"a fleet needs Ray Serve: pip install .[fleet] ({error})") from error

from anchortp_sglang.fleet import config
from anchortp_sglang.fleet.config import FleetConfig
from anchortp_sglang.fleet.ingress import SERVERS, Ingress
from anchortp_sglang.fleet.replica import Replica
from anchortp_sglang.fleet.server_process import STOP_S

_HEALTH_EVERY_S = 2.0
_HEALTH_TIMEOUT_S = 15.0
_ROUTING_STATS_EVERY_S = 1.0
_METRICS_EVERY_S = 1.0
_OPEN_PER_INGRESS = 10_000
_INGRESS_ENVIRONMENT = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
"""The gateway never blocks its loop, so it runs on Serve's: each message would cross threads twice, a millisecond."""


def build(args: Mapping[str, Any]) -> serve.Application:
    """Make the application from its arguments (FleetConfig). Raises ConfigError."""
    made = config.read(args)
    servers = serve.deployment(Replica).options(**server_options(made)).bind(made)

    def make() -> Ingress:  # in the ingress's process: what it makes cannot be sent there
        return Ingress(made.max_body_bytes)

    ingress = serve.deployment(serve.ingress(make)()).options(
        name="Ingress",
        num_replicas=made.ingresses,
        max_ongoing_requests=_OPEN_PER_INGRESS,
        ray_actor_options={
            "num_cpus": 0,
            "resources": dict(made.ingress_resources),
            "runtime_env": {"env_vars": _INGRESS_ENVIRONMENT},
        },
        graceful_shutdown_timeout_s=made.drain_s + STOP_S,
        health_check_period_s=_HEALTH_EVERY_S,
    )
    return ingress.bind(servers)


def server_options(made: FleetConfig) -> dict[str, Any]:
    """Return the options of the servers' deployment."""
    options: dict[str, Any] = {
        "name": SERVERS,
        "ray_actor_options": made.actor_options(),
        "health_check_period_s": _HEALTH_EVERY_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        "graceful_shutdown_timeout_s": made.drain_s + STOP_S,
        "request_router_config": RequestRouterConfig(
            request_router_class="anchortp_sglang.fleet.router.Router",
            request_routing_stats_period_s=_ROUTING_STATS_EVERY_S,
        ),
    }
    if made.per_node is not None:
        options["max_replicas_per_node"] = made.per_node
    if made.autoscale is None:
        return options | {"num_replicas": made.replicas}
    scale = made.autoscale
    return options | {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=scale.min,
            max_replicas=scale.max,
            initial_replicas=min(max(made.replicas, scale.min), scale.max),
            target_ongoing_requests=scale.target_open,
            metrics_interval_s=_METRICS_EVERY_S,
            look_back_period_s=max(2 * _METRICS_EVERY_S, min(30.0, scale.upscale_delay_s)),
            upscale_delay_s=scale.upscale_delay_s,
            downscale_delay_s=scale.downscale_delay_s,
            policy=AutoscalingPolicy(policy_function="anchortp_sglang.fleet.scaling:by_open_requests"),
        )
    }
