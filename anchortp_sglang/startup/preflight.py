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
from anchortp_sglang.planning.model.axes import UnsupportedModel, read_model_axes, refuse_layout_only
from anchortp_sglang.planning.model.wrappers import changes_are_shown, language_model, shown_config

_DEFAULT_PORT = 30000  # ServerArgs.port


def check_given(given: Mapping[str, Any], rules: DeviceRules) -> None:
    """Check the flags of a command line (``hooks.flags.given_flags``). Raises ValueError for the operator."""
    refusals = check_server_args(flag_values(given), rules)
    if refusals:
        raise UnsupportedError(refusals)
    port = _value(given.get("port", _DEFAULT_PORT))
    if isinstance(port, int):
        reserve_port(given.get("host", "127.0.0.1"), port).close()


def flag_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return flags with numbers and words for off parsed, as far as refusals depend on them."""
    return {name: _value(text) for name, text in given.items()}


def check_model(given: Mapping[str, Any]) -> None:
    """Check the model in the folder ``model_path``. Raises ValueError for the operator."""
    if "model_path" in given:
        overrides = given.get("json_model_override_args")
        refuse_layout_only(read_model_axes(read_config(Path(given["model_path"]), overrides)))


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


def read_config(checkpoint: Path, overrides: str | None = None) -> dict[str, Any]:
    """Read config.json of a checkpoint folder, of a multimodal one that of its language model, and apply
    ``--json-model-override-args``.

    Raises ValueError where SGLang would ask the hub, or fail obscurely, and for overrides that change what the
    checkpoint holds.
    """
    stored = _read_file(checkpoint)
    changes = _overrides(overrides)
    config = language_model(shown_config(stored, changes))
    config |= {} if changes_are_shown(stored) else changes
    if changes and _other_shapes(stored, config):
        raise ValueError(
            f"--json-model-override-args {overrides} changes the shapes of parameters, which are the checkpoint's:"
            " leave these keys out, or use a checkpoint of that shape"
        )
    return config


def _other_shapes(config: Mapping[str, Any], changed: Mapping[str, Any]) -> bool:
    try:
        before = read_model_axes(language_model(config))
    except UnsupportedModel:
        return False  # what made it so may be changed; the changed one is checked later
    return read_model_axes(changed) != before


def _overrides(text: str | None) -> dict[str, Any]:
    try:
        changes = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"--json-model-override-args is no JSON ({error})") from None
    if not isinstance(changes, dict):
        raise ValueError("--json-model-override-args takes a JSON object")
    for key, way_out in _NOT_OVERRIDDEN.items():
        if key in changes:
            raise ValueError(f"--json-model-override-args cannot change {key}: {way_out}")
    return changes


_OTHER_MODEL = "use a checkpoint of that model"
_NOT_OVERRIDDEN = {
    "architectures": _OTHER_MODEL,
    "model_type": _OTHER_MODEL,
    "dtype": "use --dtype",
    "torch_dtype": "use --dtype",
    "text_config": "give the keys inside it directly",
}


def _read_file(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "config.json"
    if not path.is_file():
        raise ValueError(
            f"--model-path {checkpoint} is no folder with a Hugging Face checkpoint: there is no {path};"
            " give its folder, or the OWNER/NAME of its repository"
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
