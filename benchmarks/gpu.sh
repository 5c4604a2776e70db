#!/usr/bin/env bash
# Every CUDA figure of docs/performance.md, in slices of at most nine minutes each: what measures is ended after 8.5
# minutes and killed after 8.75, then its figures are checked.
#
#   benchmarks/gpu.sh --list                                  the slices
#   benchmarks/gpu.sh SLICE OUT [--data-dir DIR] [--smoke]    measure one; leaves log, JSON, CSV and checks in OUT/SLICE
#   benchmarks/gpu.sh all OUT [...]                           one after the other, those that are not complete yet
#   benchmarks/gpu.sh --summary OUT                           all that was measured, against the bars; OUT/checks.json
#
# Slices are independent of each other. One that is complete is shown, not measured again: remove OUT/SLICE for that.
# One in which a method or a mode is missing is not complete.
# DIR holds cifar-100-python; without it the throughput is that of a generated set of the same shape. --smoke runs the same
# code with tiny sizes on the CPU; its figures mean nothing. PYTHON names another interpreter.
set -euo pipefail
self=$(realpath "$0")

# slice                   network                                 batch  memory format    methods
SLICES="
resnet50                  timm/resnet50@224                       128    --channels-last  shared
resnet50-smaller          timm/resnet50@224                       128    --channels-last  smaller
cifar-resnet50            cifar/resnet50@32                       256    --channels-last  shared
cifar-resnet50-smaller    cifar/resnet50@32                       256    --channels-last  smaller
cifar-resnet56            cifar/resnet56@32                       256    --channels-last  shared
cifar-resnet56-smaller    cifar/resnet56@32                       256    --channels-last  smaller
cifar-resnet110           cifar/resnet110@32                      256    --channels-last  shared
cifar-resnet110-smaller   cifar/resnet110@32                      256    --channels-last  smaller
mobilenetv3               timm/mobilenetv3_large_100@224          128    --channels-last  shared
mobilenetv3-smaller       timm/mobilenetv3_large_100@224          128    --channels-last  smaller
vit-small                 timm/vit_small_patch16_224@224          128    -                shared
vit-small-smaller         timm/vit_small_patch16_224@224          128    -                smaller
swin-tiny                 timm/swin_tiny_patch4_window7_224@224   128    -                shared
swin-tiny-smaller         timm/swin_tiny_patch4_window7_224@224   128    -                smaller
convnext-tiny             timm/convnext_tiny@224                  128    --channels-last  shared
convnext-tiny-smaller     timm/convnext_tiny@224                  128    --channels-last  smaller
throughput                cifar/resnet18                          -      --channels-last  common
overhead                  cifar/resnet20                          -      -                common
"
SHARED="stochastic-depth st st-inter-stage gkt"
SMALLER="st++-one-side st++"

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$self"
  exit "${1:-0}"
}

fail() {
  echo "gpu.sh: error: $1" >&2
  exit 2
}

names() { awk 'NF { print $1 }' <<<"$SLICES"; }

smoke="" data=()
words=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage ;;
    --list) names; exit ;;
    --smoke) smoke=1; shift ;;
    --data-dir)
      [ $# -ge 2 ] || fail "--data-dir: give the folder that holds cifar-100-python"
      data=(--data-dir "$(realpath -m "$2")"); shift 2 ;;
    *) words+=("$1"); shift ;;
  esac
done
[ ${#words[@]} -eq 2 ] || usage 2
slice=${words[0]} out=$(realpath -m "${words[1]}")
# Of a path that is relative to where we are now; links stay, an environment is found through them.
case ${PYTHON:-} in /*) ;; */*) PYTHON=$PWD/$PYTHON ;; esac
cd "$(dirname "$self")/.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"

if [ "$slice" = --summary ]; then
  exec "$PYTHON" benchmarks/gpu_checks.py summary "$out"
fi
if [ "$slice" = all ]; then
  for each in $(names); do
    "$self" "$each" "$out" ${data[@]+"${data[@]}"} ${smoke:+--smoke} || echo "gpu.sh: $each did not end well, going on" >&2
  done
  exec "$PYTHON" benchmarks/gpu_checks.py summary "$out"
fi
row=$(awk -v slice="$slice" '$1 == slice' <<<"$SLICES")
[ -n "$row" ] || fail "no slice '$slice'; give one of: $(names | tr '\n' ' ')"
read -r _ network batch format methods <<<"$row"

folder=$out/$slice
if [ -s "$folder/checks.json" ]; then
  echo "$slice: complete; remove $folder to measure again"
  exec "$PYTHON" benchmarks/gpu_checks.py show "$folder"
fi
mkdir -p "$folder"
# What an earlier try left behind is not what this one measures.
(cd "$folder" && rm -f step_time.json step_time.csv step_time.svg throughput.json overhead.json checks-partial.json)

case $slice in
  throughput)
    command=("$PYTHON" benchmarks/throughput.py --output "$folder" ${data[@]+"${data[@]}"} ${smoke:+--smoke}) ;;
  overhead)
    command=("$PYTHON" benchmarks/loop_overhead.py --model "$network" --output "$folder/overhead.json")
    if [ -n "$smoke" ]; then command+=(--device cpu --rounds 1); else command+=(--device cuda --device-data); fi ;;
  *)
    # The small sides are those that the networks take at all.
    if [ -n "$smoke" ]; then
      side=32
      case $network in *swin*) side=56 ;; *vit*) side=64 ;; *convnext*) side=80 ;; esac
      size=(--model "${network%@*}@$side" -b 2 --device cpu --modes eager --repeats 1 --num-subnets 1 --num-classes 10)
    else
      size=(--model "$network" -b "$batch" --device cuda --modes eager compiled --repeats 20 --minutes 7.5)
    fi
    [ "$format" = - ] || size+=("$format")
    if [ "$methods" = smaller ]; then chosen=$SMALLER; else chosen=$SHARED; fi
    # shellcheck disable=SC2086
    command=("$PYTHON" -m unloaf bench step "${size[@]}" --amp --methods $chosen --output "$folder") ;;
esac

status=0
timeout --signal=INT --kill-after=15 510 "${command[@]}" 2>&1 | tee "$folder/log.txt" || status=$?
# What was written before a fault or the end of the time counts, but the slice is not complete.
"$PYTHON" benchmarks/gpu_checks.py check "$slice" "$folder" || exit $((status ? status : 1))
if [ "$status" -ne 0 ]; then
  mv "$folder/checks.json" "$folder/checks-partial.json"
  echo "$slice: not complete, it ended with code $status; see $folder/log.txt" >&2
  exit "$status"
fi
