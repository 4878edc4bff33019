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
PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
EXTRA=$WORK/site
mkdir "$EXTRA"
export PYTHONPATH="$PWD:$EXTRA${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export PATH="$EXTRA/bin:$PATH:/usr/local/cuda/bin"      # CUDA's tools may be only in its own folder
export BENCH_COMMAND="bash bench/gpu.sh OUT${AGAIN:+ again}"

"$PYTHON" - <<'PY' || exit 1
import subprocess, sys
try:
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.strip()
except OSError:
    found = ""
if not found:
    sys.exit("no GPU: bench/gpu.sh is for machines with one; `make bench` measures a CPU, and "
             "`python bench/gpu_window.py OUT --rehearse interpreter` tries the window without one")
print(found)
PY

if [ -n "${WHEELS:-}" ]; then
  [ -d "$WHEELS" ] || { echo "WHEELS: expected a folder of wheels, got $WHEELS" >&2; exit 1; }
  mapfile -t LACKING < <("$PYTHON" - "$WHEELS" <<'PY'
import re, sys
from importlib import metadata
from pathlib import Path
have = {re.sub(r"[-_.]+", "-", d.metadata["Name"] or "").lower() for d in metadata.distributions()}
for wheel in sorted(Path(sys.argv[1]).glob("*.whl")):
    if re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower() not in have:
        print(wheel)
PY
)
  for wheel in "${LACKING[@]}"; do
    # one by one: a wheel for another Python must not prevent the installation of the others
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$EXTRA" --upgrade "$wheel" 2>"$WORK/pip" \
      && echo "$(basename "$wheel"): from WHEELS" || echo "$(basename "$wheel"): not installed: $(grep -m1 ERROR "$WORK/pip")"
  done
fi

if [ -n "${STEPS:-}" ]; then
  CODE=0
  "$PYTHON" setup.py -q build_ext --inplace > "$OUT/build.log" 2>&1 || CODE=1
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
