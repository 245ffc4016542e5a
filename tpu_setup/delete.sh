#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Gives a TPU slice back, whatever its state. Disks of its hosts are lost.
#
#   tpu_setup/delete.sh --name=qi2 --zone=us-east5-a
#
# --name, --zone   as for create.sh
# --dry-run        prints every command and runs none
set -euo pipefail
# shellcheck source=tpu_setup/common.sh
. "$(dirname "$0")/common.sh"

NAME='' ZONE=''
parse "name zone" "$@"
need "name zone"
# --force also deletes the node under a live queued resource.
run gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" \
  --force --quiet
