#!/usr/bin/env bash
# Everything that needs a GPU, in one go: builds _C, runs each op's tests, measures the ops whose tests passed, and writes
# bench/results/<device>-<date>.json and the Markdown table made from it. No network. Under ten minutes: the tests run side by
# side and are stopped after TEST_SECONDS, the benches note as "not measured" what there was no time for.
#
#   WHEELS=/path/to/wheels bash bench/gpu.sh
#
# WHEELS   a folder of wheels: those that this Python lacks (peers, DeepSpeed, …) are installed, each without its dependencies,
#          into a temporary folder, never into the Python it runs with.      PYTHON   another Python than python3
# ROOMS    only these ops (default: all that dispatch.OPS names)             TEST_SECONDS   for the tests of one op (default 240)
# STEPS    models of bench_step.py ("0.5b 1.5b 8b-lora"): measures whole PPO-Lag steps on them instead of ops; another ten minutes
# REHEARSE=1   the same motions on a machine without a GPU: tiny shapes, nothing written to bench/results
# Exit 0 only if the build, every test and every bench of ours went well. A failing test is printed and its op is not measured.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
EXTRA=$WORK/site OUT=bench/results TEST_SECONDS=${TEST_SECONDS:-240} CODE=0 OPTIONS=()
mkdir "$EXTRA"
export PYTHONPATH="$PWD:$EXTRA${PYTHONPATH:+:$PYTHONPATH}" PATH="$EXTRA/bin:$PATH" PYTHONUNBUFFERED=1
export BENCH_COMMAND="bash bench/gpu.sh"
if [ -n "${REHEARSE:-}" ]; then export BENCH_TINY=1; OUT=$WORK/results; OPTIONS=(-k "not compile"); fi

echo "== packages (${SECONDS} s)"
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
    # one by one: a wheel for another Python must not keep the others out
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$EXTRA" --upgrade "$wheel" 2>"$WORK/pip" \
      && echo "$(basename "$wheel"): from WHEELS" || echo "$(basename "$wheel"): not installed: $(grep -m1 ERROR "$WORK/pip")"
  done
fi
ABSENT=" $("$PYTHON" - torch pytest pytest_benchmark hypothesis pybind11 triton deepspeed pytest_timeout 2>/dev/null <<'PY'
import contextlib, importlib, io, sys
for name in sys.argv[1:]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):     # DeepSpeed greets
            importlib.import_module(name)
    except Exception:
        print(name, end=" ")
PY
)"
for name in torch pytest pytest_benchmark hypothesis pybind11; do
  [[ $ABSENT == *" $name "* ]] && { echo "$name is missing, and there is no wheel of it in WHEELS=${WHEELS:-(not set)}"; exit 1; }
done
for name in triton deepspeed pytest_timeout; do
  [[ $ABSENT == *" $name "* ]] && echo "$name is missing: what needs it is left out"
done
TIMEOUT=(); [[ $ABSENT == *" pytest_timeout "* ]] || TIMEOUT=(--timeout "$TEST_SECONDS")

echo "== device (${SECONDS} s)"
"$PYTHON" - <<'PY' || exit 1
import os, sys, torch
if not torch.cuda.is_available() and not os.environ.get("REHEARSE"):
    sys.exit("no CUDA device: bench/gpu.sh is for machines with one; `make bench` measures a CPU")
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: a rehearsal", "torch", torch.__version__)
PY

echo "== build (${SECONDS} s)"
"$PYTHON" setup.py -q build_ext --inplace || CODE=1
"$PYTHON" -c "from saferlhf_fast.kernels import dispatch; print('_C:', dispatch.native_module()[1])" || exit 1

if [ -n "${STEPS:-}" ]; then
  for model in $STEPS; do
    echo "== a PPO-Lag step, $model (${SECONDS} s)"
    if [ -n "${REHEARSE:-}" ]; then more=(--quick --device cpu); else more=(--json "$OUT/step-$model-$(date +%F).json"); fi
    timeout -k 5 300 "$PYTHON" bench/bench_step.py --model "$model" "${more[@]}" || CODE=1
  done
  echo "== end (${SECONDS} s): $([ "$CODE" = 0 ] && echo all well || echo 'something failed, see above')"
  exit "$CODE"
fi

echo "== tests, side by side (${SECONDS} s)"
"$PYTHON" bench/run.py --rooms > "$WORK/rooms" || exit 1
[ -n "${ROOMS:-}" ] && { for room in $ROOMS; do grep "^$room " "$WORK/rooms"; done; } > "$WORK/chosen" && mv "$WORK/chosen" "$WORK/rooms"
check() {       # check NAME FILES: their output lands in $WORK/NAME.log, their exit code in $WORK/NAME.code
  local name=$1; shift
  OMP_NUM_THREADS=2 timeout -k 5 "$TEST_SECONDS" "$PYTHON" -m pytest "$@" -m "not slow" "${TIMEOUT[@]}" -p no:cacheprovider \
    > "$WORK/$name.log" 2>&1
  echo $? > "$WORK/$name.code"
}
while read -r room files; do
  # shellcheck disable=SC2086  # file names without spaces
  check "$room" $files &
done < "$WORK/rooms"
check layout tests/test_kernels_layout.py &
wait
BENCHES=()
for room in layout $(cut -d' ' -f1 "$WORK/rooms"); do
  code=$(cat "$WORK/$room.code")
  echo "$room: $(tail -1 "$WORK/$room.log")"
  if [ "$code" != 0 ]; then
    CODE=1
    echo "---- $room: the tests failed (exit $code$([ "$code" = 124 ] && echo ', out of time')); the end of their output:"
    tail -60 "$WORK/$room.log"
    echo "----"
  elif [ "$room" != layout ]; then
    BENCHES+=("bench/bench_$room.py")
  fi
done
[ ${#BENCHES[@]} -gt 0 ] || { echo "no op's tests passed: nothing is measured"; exit 1; }

BUDGET=$((540 - SECONDS)); [ "$BUDGET" -ge 60 ] || BUDGET=60
echo "== benches of ${#BENCHES[@]} ops, for $BUDGET s (${SECONDS} s)"
timeout -k 5 $((BUDGET + 60)) "$PYTHON" bench/run.py --out "$OUT" "${BENCHES[@]}" --budget "$BUDGET" "${OPTIONS[@]}" || CODE=1
echo "== end (${SECONDS} s): $([ "$CODE" = 0 ] && echo all well || echo 'something failed, see above')"
exit "$CODE"
