"""How many servers there should be."""

import math
from typing import Any


def by_open_requests(context: Any) -> tuple[int, dict[str, Any]]:
    """Serve's autoscaling policy: as many servers as bring their open requests to the target.

    Serve applies delays and bounds to what it returns.
    """
    loads = (context.aggregated_metrics or {}).get("open", {})
    target = context.config.get_target_ongoing_requests()
    wanted = math.ceil(sum(loads.values()) / target)
    bounds = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(bounds[0], min(bounds[1], wanted)), {}
