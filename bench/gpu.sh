#!/usr/bin/env bash
# Everything that needs a GPU, in short commands for a machine without network; bench/gpu_window.py lists the content.
#
#   WHEELS=/path/to/wheels bash bench/gpu.sh OUT          the first command, 420 s: build, tests, checks, figures, peers
#   bash bench/gpu.sh OUT again                           the second one, 190 s, while the machine is still available
#   STEPS="0.5b 1.5b 8b-lora" bash bench/gpu.sh OUT       whole PPO-Lag steps on models of these sizes, at most 300 s each
#
# OUT      a folder for rows.jsonl, table.md and the logs; only build/ and the native module are also written
# WHEELS   a folder of wheels; the ones that this Python lacks (peers, DeepSpeed, …) are installed, each without its
#          dependencies, into a temporary folder, never into the running Python
# PYTHON   another Python than python3        BENCH_COMMIT   the commit to note with the figures if there is no git
set -uo pipefail
[ $# -ge 1 ] && [ $# -le 2 ] && [ "${2:-again}" = again ] || { echo "usage: bash bench/gpu.sh OUT [again]" >&2; exit 2; }
mkdir -p "$1" && OUT=$(cd "$1" && pwd) || { echo "expected a folder that can be written, got $1" >&2; exit 2; }
AGAIN=${2:-}
cd "$(dirname "$0")/.."
. bench/gpu/common.sh
export BENCH_COMMAND="bash bench/gpu.sh OUT${AGAIN:+ again}"

require_gpu "bench/gpu.sh is for machines with one; \`make bench\` measures a CPU, and \`python bench/gpu_window.py OUT --rehearse interpreter\` tries the window without one"

[ -z "${WHEELS:-}" ] || install_wheels "$WHEELS"

if [ -n "${STEPS:-}" ]; then
  CODE=0
  build_native "$OUT/build.log" || CODE=1
  for model in $STEPS; do
    echo "== a PPO-Lag step, $model (${SECONDS} s)"
    timeout -k 5 300 "$PYTHON" bench/bench_step.py --model "$model" --json "$OUT/step-$model-$(date +%F).json" || CODE=1
  done
  exit "$CODE"
fi

# The process ends itself in time; timeout is for the case that it cannot.
LEFT=$((420 - SECONDS))
[ -z "$AGAIN" ] || LEFT=$((190 - SECONDS))
timeout -k 5 $((LEFT + 20)) "$PYTHON" bench/gpu_window.py "$OUT" --seconds "$LEFT" ${AGAIN:+--again}
