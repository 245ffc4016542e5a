#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Asks for a TPU slice through the queue and waits until it is there.
#
#   tpu_setup/create.sh --name=qi2 --zone=us-east5-a --type=v5p-128 [--spot=1]
#
# --name      of the queued resource and of its node
# --zone      where; the project is gcloud's current one
# --type      accelerator type: v5litepod-256, v5p-128, v6e-256, ...
# --spot      1: a spot slice, cheap, may be taken away at any time;
#             empty (the default): on demand
# --runtime   TPU software version; by default the one of the type
# --wait      seconds between looks at the queue (30), 0: do not wait
# --dry-run   prints every command and runs none
#
# The queue and its states: https://cloud.google.com/tpu/docs/queued-resources
set -euo pipefail
# shellcheck source=tpu_setup/common.sh
. "$(dirname "$0")/common.sh"

NAME='' ZONE='' TYPE='' SPOT='' RUNTIME='' WAIT=30
parse "name zone type spot runtime wait" "$@"
need "name zone type"

if [[ -z $RUNTIME ]]; then
  case $TYPE in
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
    v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
    *) fail "no software version is known for --type=$TYPE; pass --runtime." ;;
  esac
fi

state() {
  gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
    --format='value(state.state)'
}

run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" \
  --zone="$ZONE" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" \
  ${SPOT:+--spot}

[[ $WAIT != 0 ]] || exit 0
if [[ -n $DRY_RUN ]]; then
  run gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
    '--format=value(state.state)'
  exit 0
fi
while true; do
  now=$(state)
  echo "$(date +%T) $NAME: $now"
  case $now in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDED)
      fail "the queue gave up on $NAME ($now); delete it and try another zone."
      ;;
  esac
  sleep "$WAIT"
done
