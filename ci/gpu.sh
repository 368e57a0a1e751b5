#!/bin/bash
# First contact with a GPU, in one command and under eight minutes; no network, none of it needs an engine.
#
#     ci/gpu.sh --packages       with a network and the same Python: what a bare machine lacks, to ci/gpu-packages
#     ci/gpu.sh [FOLDER]         on the GPU: the logs and results of all steps to FOLDER [gpu-results], under 16 MB
#
# The machine has torch and its Triton, pytest and numpy. A step that fails or takes too long does not stop the others;
# the end says which did, here and in FOLDER/summary.txt, and the exit status is their number.
set -u
cd "$(dirname "$0")/.." || exit 1
packages=$PWD/ci/gpu-packages

if [ "${1:-}" = --packages ]; then
  exec python3 -m pip install --quiet --upgrade --target "$packages" --no-deps \
    click rich markdown-it-py mdurl pygments \
    safetensors pillow jinja2 markupsafe tiktoken regex
fi

mkdir -p "${1:-gpu-results}" || exit 1
out=$(cd "${1:-gpu-results}" && pwd)
deadline=$((SECONDS + 470))
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/tests:$packages${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
failed=()

# step NAME SECONDS COMMAND…: its output to FOLDER/NAME.log
step() {
  local name=$1 seconds=$2 left=$((deadline - SECONDS)) status
  shift 2
  [ "$seconds" -gt "$left" ] && seconds=$left
  echo "== $name"
  if [ "$seconds" -le 0 ]; then
    failed+=("$name: no time was left")
    return
  fi
  timeout --kill-after=5 "$seconds" "$@" > "$out/$name.log" 2>&1
  status=$?
  # Eleven logs of a megabyte leave room for the results.
  tail -c 1000000 "$out/$name.log" > "$out/$name.tail" && mv "$out/$name.tail" "$out/$name.log"
  tail -n 3 "$out/$name.log"
  case $status in
    0) ;;
    124 | 137) failed+=("$name: not done after $seconds s") ;;
    127) failed+=("$name: $1 is not on this machine") ;;
    *) failed+=("$name: exit status $status") ;;
  esac
}

step machine 20 nvidia-smi
# The shared conftest.py makes checkpoints, for which a bare machine has not all packages.
step tests 150 python3 -m pytest -q --noconftest -p no:cacheprovider tests/kernels/test_gpu.py
step sanitizer 60 compute-sanitizer --tool memcheck --error-exitcode 9 python3 -m bench.one_launch
for rank in "--tp 1" "--tp 8" "--ep 8"; do
  name=tune${rank// /}
  # shellcheck disable=SC2086 # two words
  step "${name/--/-}" 45 python3 -c "from k26_plugins.cli import app; app()" tune --quick $rank --save "$out/${name/--/-}.json"
done
step benchmark 140 python3 -m bench.experts --layers tp8,whole --tokens 1,8,64,512,4096 --seconds 110 --folder "$out"
for tokens in 1 64; do
  step "ncu-$tokens" 40 ncu --kernel-name moe_gemm_kernel --launch-count 2 --set full --page details \
    python3 -m bench.one_launch --layer tp8 --tokens "$tokens"
done

# Whatever made a larger file than expected: the largest go first.
while [ "$(du -sk "$out" | cut -f1)" -gt 15000 ]; do
  largest=$(find "$out" -type f -printf '%s %p\n' | sort -n | tail -n 1 | cut -d' ' -f2-)
  failed+=("${largest##*/} was too large to keep")
  rm "$largest"
done
{
  echo "${#failed[@]} steps failed"
  [ "${#failed[@]}" -eq 0 ] || printf '%s\n' "${failed[@]}"
} | tee "$out/summary.txt"
exit "${#failed[@]}"
