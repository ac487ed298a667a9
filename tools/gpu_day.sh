#!/usr/bin/env bash
# What a machine with a GPU can show of this project, in the order of value, in less than 8 minutes:
#
#   tools/gpu_day.sh [FOLDER]      a log of each part and a table, table.txt, in FOLDER (default: $OUT, else ./gpu-day)
#
# A part that fails, or that runs into its limit, does not stop the others; the table is written as they end. Without a
# GPU the parts that need one say "skipped". PYTHON is the interpreter (default: that of the environment, else python3).
set -uo pipefail

cd "$(dirname "$0")/.."
folder=${1:-${OUT:-gpu-day}}
mkdir -p "$folder"
table=$folder/table.txt
python=${PYTHON:-$(make -s print-python 2>/dev/null)}
[ -x "$python" ] || python=python3
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
ends_at=$((SECONDS + ${GPU_DAY_LIMIT_S:-470}))

# part NAME LIMIT_S COMMAND…: run it, with its output in a log; add its line to the table.
part() {
  local name=$1 limit=$2 left=$((ends_at - SECONDS)) began=$SECONDS code said
  shift 2
  if [ "$left" -lt 20 ]; then
    printf '%-25s %-9s %5s  %s\n' "$name" "no time" "" "" | tee -a "$table"
    return
  fi
  timeout --kill-after=10 "$((limit < left ? limit : left))" "$@" >"$folder/$name.log" 2>&1
  code=$?
  said=$(grep -E '(passed|failed|skipped|error).* in [0-9.]+s' "$folder/$name.log" | tail -1 | tr -d '=')
  case $code in
    0) [[ $said == *passed* || $name == overhead || $name == parity* ]] && code=passed || code=skipped ;;
    124 | 137) code="too long" ;;
    *) code="failed" ;;
  esac
  printf '%-25s %-9s %4d s %s\n' "$name" "$code" "$((SECONDS - began))" "$said" | tee -a "$table"
  grep -E '^(FAILED|ERROR) |EQUAL|DIFFERENT|TFS|GB/s|seconds to|tokens/s|time between|first token' "$folder/$name.log" | sed 's/^/    /' | tee -a "$table"
}

pytest=("$python" -m pytest -m gpu -s -rfE)
{ nvidia-smi -L 2>/dev/null || echo "no GPU"; git log -1 --format='commit %h' 2>/dev/null; } | tee "$table"
part serving 170 "${pytest[@]}" tests/gpu/test_serving.py  # stock's tokens, kills, a loss
part alone 120 "${pytest[@]}" tests/gpu/test_alone.py      # graphs after the start and after a recovery
part anchors 60 "${pytest[@]}" tests/gpu/test_anchor.py tests/unit/memory/test_arena_contract.py
part mover 60 "${pytest[@]}" tests/gpu/test_numbers.py tests/unit/platforms/test_mover_contract.py
part platform 40 "${pytest[@]}" tests/unit/platforms/test_contract.py
# Tokens and logprobs beside stock's, of dense models and of experts. What a rank of several holds is part of `serving`.
device=cuda tp=1
[ -e /dev/nvidiactl ] || device=cpu tp=2
for case in qwen3:bfloat16:0.1 qwen3_moe:float32:0.001 qwen3_moe:bfloat16:0.1; do
  IFS=: read -r family dtype tolerance <<<"$case"
  "$python" -m anchortp_sglang.testing.tiny_checkpoint "$folder/$family" --family "$family" >"$folder/$family.log" 2>&1
  part "parity-$family-$dtype" 90 "$python" -m anchortp_sglang.cli parity --model "$folder/$family" --tp "$tp" \
    --device "$device" --dtype "$dtype" --tolerance "$tolerance"
  rm -rf "${folder:?}/$family"
done
# Beside stock, in turns on one device: tokens per second, times to the first token and between tokens.
part overhead 150 "$python" -m anchortp_sglang.cli bench overhead --device "$device" --overlap --rounds 2 --batches 1,32,256
# NCCL between ranks on one GPU instead of gloo, where a library that can do that is preloaded (NCCL 2.30).
if [ -n "${NCCL_MULTI_RANK_GPU_ENABLE:-}" ]; then
  ANCHORTP_GPU_FLAGS="${ANCHORTP_GPU_FLAGS:-}" part nccl 120 "${pytest[@]}" tests/gpu/test_serving.py -k two_devices
fi
echo "table: $table"
