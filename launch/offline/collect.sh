#!/usr/bin/env bash
# Collects, on a machine with a network, what a GPU machine without one lacks, into one folder (less than 60 MiB).
#
#   launch/offline/collect.sh FOLDER            # needs python3 with pip, tar
#
# Then copy FOLDER and this repository to the GPU machine, and there
#
#   FOLDER/install.sh                           # into FOLDER/site; changes nothing else
#   export PYTHONPATH=$PWD:FOLDER/site
#   python3.12 -m anchortp_sglang.cli doctor
#   python3.12 -m pytest -m gpu -s tests/gpu tests/unit/platforms/test_contract.py tests/unit/memory/test_arena_contract.py tests/unit/platforms/test_mover_contract.py
#
# For Python 3.12 with torch 2.11 and what wheels.txt says is there. docs/cuda.md names the environment variables that
# SGLang wants with that torch.
set -euo pipefail

folder=${1:?usage: launch/offline/collect.sh FOLDER}
here=$(cd "$(dirname "$0")" && pwd)
sglang=0.5.23
limit_mib=60

mkdir -p "$folder/wheels"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

platforms=(--platform any --platform linux_x86_64 --platform manylinux1_x86_64 --platform manylinux2014_x86_64)
for glibc in 5 12 17 24 27 28 31 34; do # SGLang's own wheel wants 2.34
  platforms+=(--platform "manylinux_2_${glibc}_x86_64")
done

download() { # FOLDER ARGUMENTS…: wheels for Python 3.12 on x86-64 Linux
  python3 -m pip download --quiet --dest "$1" --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --abi cp312 --abi abi3 --abi none "${platforms[@]}" "${@:2}"
}

download "$folder/wheels" --requirement "$here/wheels.txt"

# SGLang without what serves other purposes: 11 of 37 MiB. Its metadata stays, for the plugin's version check.
download "$scratch" "sglang==$sglang"
python3 -m zipfile -e "$scratch"/sglang-*.whl "$scratch/sglang"
(
  cd "$scratch/sglang"
  rm -rf sglang/multimodal_gen sglang/test sglang/srt/rust_extensions sglang/kernels/jit/benchmark
  find sglang -path '*rust_tree_core*' -name '*.so' -delete
  tar czf "$scratch/sglang.tar.gz" -- *
)
mv "$scratch/sglang.tar.gz" "$folder/sglang-$sglang-trimmed.tar.gz"

cat > "$folder/install.sh" <<'INSTALL'
#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")"
"${PYTHON:-python3.12}" -m pip install --no-index --no-deps --quiet --target site wheels/*.whl
tar xzf sglang-*-trimmed.tar.gz -C site
echo "installed into $PWD/site: put it on PYTHONPATH"
INSTALL
chmod +x "$folder/install.sh"

size_mib=$(du -sm "$folder" | cut -f1)
echo "$folder: $(ls "$folder/wheels" | wc -l) wheels and SGLang, $size_mib MiB"
if ((size_mib >= limit_mib)); then
  echo "more than $limit_mib MiB: leave something out of wheels.txt" >&2
  exit 1
fi
