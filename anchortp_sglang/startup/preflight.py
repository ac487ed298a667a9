"""Refuses what can be refused before SGLang is imported, which takes ten seconds. Resolved values are checked later."""

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anchortp_sglang.admission.checks import UnsupportedError, check_server_args
from anchortp_sglang.admission.devices import DeviceRules
from anchortp_sglang.anchor.run_base import default_base
from anchortp_sglang.planning.model.axes import read_model_axes, refuse_layout_only

_DEFAULT_PORT = 30000  # ServerArgs.port


def check_given(given: Mapping[str, Any], rules: DeviceRules) -> None:
    """Check the flags of a command line (``hooks.flags.given_flags``). Raises ValueError for the operator."""
    flags = {name: _value(text) for name, text in given.items()}
    refusals = check_server_args(flags, rules)
    if refusals:
        raise UnsupportedError(refusals)
    if "model_path" in given:
        refuse_layout_only(read_model_axes(read_config(Path(given["model_path"]))))
    port = _value(given.get("port", _DEFAULT_PORT))
    if isinstance(port, int):
        reserve_port(given.get("host", "127.0.0.1"), port).close()


def check_run_base(given: str | None) -> None:
    """Check that a run directory can be made. ``given``: ``--anchor-run-dir``. Raises ValueError."""
    base = default_base() if given is None else Path(given)
    existing = next(folder for folder in (base, *base.parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"the run directory cannot be made in {base}, as {existing} cannot be written: choose another")


def architectures(given: Mapping[str, Any]) -> list[str]:
    """Return the model classes that config.json names; none if it cannot be read."""
    try:
        return list(read_config(Path(given["model_path"])).get("architectures") or [])
    except (KeyError, ValueError):
        return []


def reserve_port(host: str, port: int) -> socket.socket:
    """Hold a port for a server that binds it later with SO_REUSEADDR, as uvicorn does.

    SGLang would notice a port in use only after everything has been loaded. Until then the kernel could also pick this
    port for another socket, such as gloo's. Raises ValueError for the operator.
    """
    if port == 0:
        raise ValueError(
            "--port 0 cannot be used: the run directory is named by the port, so that a restarted server finds it; "
            "choose a port from 1 to 65535"
        )
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, port))
        return held
    except socket.gaierror as error:
        held.close()
        raise ValueError(f"--host {host} is no address of this machine ({error.strerror})") from None
    except (OSError, OverflowError) as error:
        held.close()
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--port {port} on {host} cannot be used ({reason}); choose another") from None


def read_config(checkpoint: Path) -> dict[str, Any]:
    """Read config.json of a checkpoint folder. Raises ValueError where SGLang would ask the hub, or fail obscurely."""
    path = checkpoint / "config.json"
    if not path.is_file():
        raise ValueError(
            f"--model-path {checkpoint} is no folder with a Hugging Face checkpoint: there is no {path};"
            " download the model first and give its folder"
        )
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object; copy it again")
    if (checkpoint / "hf_quant_config.json").exists():
        raise ValueError(f"{checkpoint} is quantized (hf_quant_config.json); use the unquantized checkpoint")
    return config


def _value(text: Any) -> Any:
    """Parse a flag's text; what is none (a switch's True, a list) stays."""
    if not isinstance(text, str):
        return text
    if text.lower() == "true":
        return True
    if text.lower() in ("false", "none", "null"):
        return None
    try:
        return int(text)
    except ValueError:
        return text
