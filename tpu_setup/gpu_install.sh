#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Prepares one GPU host: a virtual environment with the CUDA build of JAX (pip
# brings CUDA; only NVIDIA's driver must be there), and a look at the GPUs.
#
#   bash tpu_setup/gpu_install.sh
#
# --python    interpreter for the environment (python3; 3.11 to 3.13)
# --dry-run   prints every command and runs none
#
# On several GPU hosts start the same command on each of them with
#   JAX_COORDINATOR_ADDRESS=HOST0:8476 JAX_NUM_PROCESSES=N JAX_PROCESS_ID=i
set -euo pipefail
# shellcheck source=tpu_setup/common.sh
. "$(dirname "$0")/common.sh"

PYTHON=${PYTHON:-python3}
parse "python" "$@"
cd "$(dirname "$0")/.."
run "$PYTHON" -m venv .venv
run .venv/bin/pip install --quiet --upgrade pip
run .venv/bin/pip install --quiet -e '.[cuda]'
run .venv/bin/python -c '
import jax

devices = jax.devices()
if devices[0].platform != "gpu":
  raise SystemExit(
    f"error: JAX sees {devices[0].platform}, not a GPU; does nvidia-smi work?"
  )
print(f"{len(devices)} x {devices[0].device_kind}: ready")
'
