#!/usr/bin/env bash
# One server over eight GPUs of one machine, meant for production.
#
#   launch/8xgpu.sh /path/to/model [more flags of sglang or --anchor-...]
#
# No recovery has come through on a GPU yet (docs/cuda.md). Do not serve
# anybody with it before `make test-gpu` passes on your machine; launch/cpu-tp4.sh runs today.
set -euo pipefail

model=${1:?usage: launch/8xgpu.sh MODEL_DIRECTORY [flags]}
shift

flags=(
  --model-path "$model"
  --host 0.0.0.0
  --port 30000
  --device cuda
  --tp-size 8
  # Of each GPU's memory, for weights and KV; what survivors take over is planned inside of it, down
  # to --anchor-min-devices. The rest is for contexts, activations and graphs.
  --mem-fraction-static 0.80
  # Five GPUs are the least on which this model with its KV cache is worth serving; below that,
  # open requests end with an error and /health says 503, so that a load balancer turns away. KV
  # slots are as many as fit at every width down to that, the weights of a lost GPU beside old ones.
  --anchor-min-devices 5
  # If the server process itself dies, its weights stay on the GPUs this long for the next one.
  --anchor-linger 120
  # A rank stuck in a collective is replaced after this time. Longer than your longest step, and than
  # compiling kernels at first use takes.
  --anchor-hang-timeout 30
  # A recovery that takes longer ends the open requests with an error: clients can retry elsewhere.
  --anchor-recovery-deadline 60
  # Sockets. Mode 0700, owned by the user who runs the server.
  --anchor-run-dir /run/anchortp
)
exec "${PYTHON:-python3}" -m anchortp_sglang.launch_server "${flags[@]}" "$@"
