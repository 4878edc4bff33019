# What the commands for a GPU machine share; to be sourced by bash from the root of the checkout. The machine may have
# no network. PYTHON names another Python than python3.
PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
EXTRA=$WORK/site
mkdir "$EXTRA"
export PYTHONPATH="$PWD:$EXTRA${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export PATH="$EXTRA/bin:$PATH:/usr/local/cuda/bin"      # CUDA's tools may be only in its own folder

# require_gpu SENTENCE: prints the GPUs, or ends the command with the sentence.
require_gpu() {
  GPUS=$(nvidia-smi -L 2>/dev/null) && [ -n "$GPUS" ] || { echo "no GPU: $1" >&2; exit 1; }
  echo "$GPUS"
}

# install_wheels FOLDER [--trainer]: the wheels that this Python lacks (gpu/wheels.py), each without its dependencies, into the
# temporary folder EXTRA, never into the running Python. Fails if one could not be installed; ends the command if the choice fails.
install_wheels() {
  local missing wheel failed=0
  missing=$("$PYTHON" bench/gpu/wheels.py "$@") || exit 1
  while read -r wheel; do
    [ -n "$wheel" ] || continue
    # one by one: a wheel for another Python must not prevent the installation of the others
    if "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$EXTRA" --upgrade "$wheel" 2>"$WORK/pip" </dev/null; then
      echo "$(basename "$wheel"): installed"
    else
      echo "$(basename "$wheel"): not installed: $(grep -m1 ERROR "$WORK/pip")" >&2
      failed=1
    fi
  done <<< "$missing"
  return $failed
}

# build_native LOG: _C for this device. Without it the reference implementations run, and the log says why.
build_native() {
  "$PYTHON" setup.py -q build_ext --inplace > "$1" 2>&1
}
