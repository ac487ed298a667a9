#!/usr/bin/env bash
# Four tensor-parallel ranks on a machine without a GPU. A "device" is an anchor process that owns
# memory: killing it really loses the bytes, so every recovery can be watched on a laptop.
#
#   launch/cpu-tp4.sh /path/to/model [more flags of sglang or --anchor-...]
#   PYTHON=$(make -s print-python) launch/cpu-tp4.sh /path/to/model      # from a checkout
#
# Then, in another terminal:
#   anchortp status
#   anchortp inject --device 2 --kind process     # kill a rank: same width again
#   anchortp inject --device 2 --kind device      # lose a device: on with three
#   anchortp timeline                             # where the time of the last recovery went
set -euo pipefail

model=${1:?usage: launch/cpu-tp4.sh MODEL_DIRECTORY [flags]}
shift

flags=(
  --model-path "$model"
  --host 127.0.0.1
  --port 30000
  # What SGLang needs on a CPU (attention backend, thread binding, no overlap) is set by itself.
  --device cpu
  --tp-size 4
  # The KV cache, in tokens. All "devices" share this machine's memory, so choose it yourself.
  --max-total-tokens 16384
  # With less than two devices left, end open requests with an error instead of serving slowly.
  --anchor-min-devices 2
  # Allows `anchortp inject`. Leave it out on a server that matters.
  --anchor-allow-injection
)
exec "${PYTHON:-python3}" -m anchortp_sglang.launch_server "${flags[@]}" "$@"
