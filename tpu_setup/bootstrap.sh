#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Prepares one TPU VM host: a virtual environment with the TPU build of JAX,
# and a look at the chips. Run it in a checkout of this repository.
#
#   bash tpu_setup/bootstrap.sh
#
# Creating, watching and deleting TPUs, and several hosts, are not covered.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
"$PYTHON" -m venv .venv
.venv/bin/pip install --quiet --upgrade pip
.venv/bin/pip install --quiet -e '.[tpu]'
.venv/bin/python - <<'PY'
import jax

devices = jax.devices()
if devices[0].platform != "tpu":
  raise SystemExit(
    f"error: JAX sees {devices[0].platform}, not a TPU; is this a TPU VM, and "
    "is no other process holding the chips?"
  )
print(f"{len(devices)} x {devices[0].device_kind}: ready")
PY
