#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most nine minutes: bash benchmarks/gpu.sh [--dry-run] [OUT]
#
# Runs with what is installed for ${PYTHON:-python3} and installs nothing. A package that is missing is named,
# and what needs it is left out. Every part has a time limit of its own. One that fails is recorded, and the
# next one runs. OUT (by default benchmarks/results/gpu) gets summary.md and summary.json, every part's output,
# and the results in cost/.
# GPU_SH_DEVICE=cpu runs the same parts on a tiny model without a GPU.
set -uo pipefail

dry=""
if [ "${1:-}" = "--dry-run" ]; then
    dry=yes
    shift
fi
out="${1:-}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
case "$out" in
"") out="$root/benchmarks/results/gpu" ;;
/*) ;;
*) out="$PWD/$out" ;;
esac
cd "$root" || exit 1

python="${PYTHON:-python3}"
device="${GPU_SH_DEVICE:-cuda}"
total=490 # seconds for all parts; the rest of the nine minutes is for the summary
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

if [ -z "$dry" ]; then
    mkdir -p "$out/cost" || exit 1
    : >"$out/parts.tsv"
fi

# part NAME SECONDS COMMAND...: run it within its limit and what is left of all; note how it ended.
part() {
    local name="$1" limit="$2" left=$((total - SECONDS)) status begun=$SECONDS
    shift 2
    if [ -n "$dry" ]; then
        printf '%s (at most %s s): %s\n' "$name" "$limit" "$*"
        return
    fi
    [ "$left" -lt "$limit" ] && limit="$left"
    if [ "$limit" -lt 5 ]; then
        note "$name" "no time left" 0 "$limit" "$*"
        return
    fi
    timeout --kill-after=15 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    note "$name" "$status" "$((SECONDS - begun))" "$limit" "$*"
}

note() {
    printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" "$5" >>"$out/parts.tsv"
    echo "$1: status $2 after $3 s (limit $4 s)"
}

leave_out() {
    if [ -n "$dry" ]; then
        echo "$1: left out: $2"
    else
        note "$1" "left out: $2" 0 0 ""
    fi
}

cost() { # NAME SECONDS ARGUMENTS...
    local name="$1" limit="$2"
    shift 2
    part "$name" "$limit" "$python" -m benchmarks cost --device "$device" --out "$out/cost" "$@"
}

peers="$("$python" -m benchmarks.gpu_summary optimizers 2>/dev/null)" || peers="grit"

tests=(tests/integration/test_devices.py tests/integration/test_device_cost.py --junitxml "$out/tests.xml")
if [ "$device" = cpu ]; then
    total=1000 # a busy laptop is slow, and nobody pays for it by the minute
    part environment 60 "$python" -m benchmarks.gpu_summary environment "$out/environment.json"
    part tests 300 "$python" -m pytest -q -p no:cacheprovider -m "not slow" -k cpu "${tests[@]}"
    small=(--model tiny --length 16 --steps 2 --seconds 5 --threads 1)
    cost tiny 180 "${small[@]}" --optimizers "$peers" --trace "$out/trace.json"
    cost tiny-nf4 120 "${small[@]}" --quantize nf4 --optimizers grit
    cost scaling 120 "${small[@]}" --optimizers grit --scale --scale-tokens 8,16 --scale-layers 1,2
else
    part environment 25 "$python" -m benchmarks.gpu_summary environment "$out/environment.json"
    part tests 90 "$python" -m pytest -q -p no:cacheprovider -m gpu "${tests[@]}"
    cost llama-8b 130 --model llama-3-8b-shape --optimizers grit --steps 8 --block 2 --seconds 30
    if "$python" -c "import bitsandbytes" >/dev/null 2>&1; then
        cost llama-8b-nf4 100 --model llama-3-8b-shape --quantize nf4 --optimizers grit \
            --steps 4 --block 2 --seconds 20
    else
        leave_out llama-8b-nf4 "bitsandbytes is not installed"
    fi
    # One pass a step: the optimizers' own share is the largest there, and many of them fit into the time.
    cost llama-8b-peers 115 --model llama-3-8b-shape --accumulation 1 --optimizers "$peers" \
        --steps 4 --block 2 --seconds 15
    cost scaling 60 --model llama-3-8b-shape --layers 4 --accumulation 1 --optimizers grit \
        --scale --steps 6 --block 3 --seconds 3
    cost llama-1b 50 --model llama-3.2-1b-shape --optimizers grit --steps 10 --seconds 10 \
        --trace "$out/trace-1b.json.gz"
fi
part report 20 "$python" -m benchmarks report "$out/cost"

if [ -z "$dry" ]; then
    timeout 30 "$python" -m benchmarks.gpu_summary summary "$out"
    echo "written: $out/summary.md, $out/summary.json"
    # 0 if every part that there is was done.
    awk -F'\t' '$2 != "0" && $2 !~ /^left out/ { failed = 1 } END { exit failed }' "$out/parts.tsv"
fi
