"""launch/kubernetes.yaml as far as one machine goes: its user, volumes, root, arguments and environment, no cluster.

A mount and a pid namespace, and a root of read-only folders of this machine in place of the image.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "launch" / "kubernetes.yaml"
_IMAGE = ["/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc"]

_SCRIPT = r"""
set -e
[ -z "$GROUP" ] || echo $$ > "$GROUP/cgroup.procs"
mount --make-rprivate /
mount -t tmpfs -o mode=755 image "$NEW"
for folder in $IMAGE; do
  mkdir -p "$NEW$(dirname "$folder")"
  if [ -L "$folder" ]; then
    cp -P "$folder" "$NEW$folder"
    folder=$(readlink -f "$folder")
    mkdir -p "$NEW$(dirname "$folder")"
  fi
  if [ -d "$folder" ] && [ ! -e "$NEW$folder" ]; then
    mkdir "$NEW$folder"
    mount --bind -o ro "$folder" "$NEW$folder"
  fi
done
mkdir -p "$NEW/proc" "$NEW/dev" "$NEW/sys" "$NEW/models/model"
mount -t proc proc "$NEW/proc"
mount --rbind /dev "$NEW/dev"
mount --rbind /sys "$NEW/sys"
mount --bind "$MODEL" "$NEW/models/model"
for volume in $WRITABLE; do
  mkdir -p "$NEW$volume"
  mount -t tmpfs -o "mode=2777,gid=$GID" volume "$NEW$volume"
done
mount -o remount,ro "$NEW"
exec chroot "$NEW" setpriv --reuid "$USER_ID" --regid "$GID" --clear-groups --no-new-privs --bounding-set=-all \
  --inh-caps=-all env -i "$@"
"""


@dataclass(frozen=True)
class Manifest:
    """What the manifest says of the server."""

    pod: dict
    container: dict

    @classmethod
    def read(cls):
        deployment = next(yaml.safe_load_all(MANIFEST.read_text()))
        pod = deployment["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        return cls(pod, container)

    @property
    def environment(self):
        return [f"{entry['name']}={entry['value']}" for entry in self.container["env"]]

    @property
    def writable(self):
        """Where volumes are mounted that can be written."""
        return [mount["mountPath"] for mount in self.container["volumeMounts"] if not mount.get("readOnly")]

    def probe_paths(self):
        return {self.container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}


def start(manifest, model, new_root, log, more_arguments, group=None, without=()):
    """The server as process 1 of its pid namespace; the child is unshare, and it dies with it."""
    security = manifest.pod["securityContext"]
    assert manifest.container["securityContext"]["readOnlyRootFilesystem"]
    assert manifest.container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    arguments = [one for one in manifest.container["args"] if not one.startswith(tuple(without))]
    python = [f"PYTHONPATH={ROOT}", "PATH=/usr/bin:/bin", sys.executable, "-m", "anchortp_sglang.launch_server"]
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", _SCRIPT, "container"]
    settings = {
        "NEW": str(new_root),
        "IMAGE": " ".join([*_IMAGE, sys.prefix, sys.base_prefix, str(ROOT)]),
        "MODEL": str(model),
        "WRITABLE": " ".join(manifest.writable),
        "USER_ID": str(security["runAsUser"]),
        "GID": str(security["runAsGroup"]),
        "GROUP": str(group or ""),
    }
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, *manifest.environment, *python, *arguments, *more_arguments],
            env=os.environ | settings,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
