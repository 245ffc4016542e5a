#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Prepares one TPU VM host: a virtual environment with the TPU build of JAX,
# a bucket as a folder if you name one, and a look at the chips. Run it in a
# checkout of this repository, on all hosts of a slice at the same time
# (launch.sh does): the chips of a slice only answer together.
#
#   bash tpu_setup/bootstrap.sh [--bucket=NAME]
#
# --bucket    Cloud Storage bucket to mount at ~/bucket with gcsfuse, for
#             workdirs and data that all hosts see. Use a bucket with
#             hierarchical namespace: checkpoints are renamed folders.
# --python    interpreter for the environment (python3; 3.11 to 3.13)
# --dry-run   prints every command and runs none
set -euo pipefail
# shellcheck source=tpu_setup/common.sh
. "$(dirname "$0")/common.sh"

BUCKET='' PYTHON=${PYTHON:-python3}
parse "bucket python" "$@"
cd "$(dirname "$0")/.."

mount_bucket() {
  local packages=https://packages.cloud.google.com/apt
  local key=/usr/share/keyrings/cloud.google.asc
  if ! command -v gcsfuse >/dev/null; then
    run sudo curl -fsSL "$packages/doc/apt-key.gpg" -o "$key"
    run sudo sh -c "echo \"deb [signed-by=$key] $packages \
gcsfuse-\$(lsb_release -cs) main\" > /etc/apt/sources.list.d/gcsfuse.list"
    run sudo apt-get update -qq
    run sudo apt-get install -y -qq gcsfuse
  fi
  run mkdir -p "$HOME/bucket"
  mountpoint -q "$HOME/bucket" ||
    run gcsfuse --implicit-dirs "$BUCKET" "$HOME/bucket"
}

run "$PYTHON" -m venv .venv
run .venv/bin/pip install --quiet --upgrade pip
run .venv/bin/pip install --quiet -e '.[tpu]'
if [[ -n $BUCKET ]]; then
  mount_bucket
fi
run .venv/bin/python -c '
import jax

from qi2_jax.parallel import distributed

distributed.initialise()
devices = jax.devices()
if devices[0].platform != "tpu":
  raise SystemExit(
    f"error: JAX sees {devices[0].platform}, not a TPU; is this a TPU VM, and "
    "is no other process holding the chips?"
  )
where = f"host {jax.process_index()} of {jax.process_count()}"
print(f"{len(devices)} x {devices[0].device_kind}, {where}: ready")
'
