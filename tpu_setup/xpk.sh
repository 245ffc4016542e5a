#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The same run on a GKE cluster, by xpk (pip install xpk, and docker).
#
#   tpu_setup/xpk.sh --cluster=C --project=P --zone=Z --type=v5p-128 \
#     --run=pretrain -- python -m qi2_jax.train --config=... --workdir=...
#
# --slices     how many slices (1)
# --image      base image with Python 3.11 to 3.13 (python:3.12)
# --restarts   how often Kubernetes restarts the run (1000). xpk does so on
#              exit status 127 to 255 by default: 143 ("saved, restart me") is
#              among them, 2 (wrong input) is not.
# --dry-run    prints the command and does not run it
#
# The checkout is copied into the image by xpk (--script-dir). Workdir and data
# must be on storage attached to the cluster (xpk storage attach).
set -euo pipefail
here=$(dirname "$0")
# shellcheck source=tpu_setup/common.sh
. "$here/common.sh"

CLUSTER='' PROJECT='' ZONE='' TYPE='' RUN='' SLICES=1 IMAGE=python:3.12
RESTARTS=1000
parse "cluster project zone type run slices image restarts" "$@"
need "cluster project zone type run"
((${#WORDS[@]})) || fail "no command after --; see --help."

printf -v command ' %q' "${WORDS[@]}"
run xpk workload create --cluster="$CLUSTER" --project="$PROJECT" \
  --zone="$ZONE" --workload="$RUN" --tpu-type="$TYPE" \
  --num-slices="$SLICES" --base-docker-image="$IMAGE" \
  --script-dir="$(cd "$here/.." && pwd)" --max-restarts="$RESTARTS" \
  --termination-grace-period-seconds=300 \
  --command="pip install --quiet -e '.[tpu]' && . tpu_setup/env.sh tpu &&$command"
