#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Starts one command on every host of a slice, in the background.
#
#   tpu_setup/launch.sh --name=qi2 --zone=us-east5-a --repo=URL -- \
#     python -m qi2_jax.train --config=experiments/pretrain.py:512 \
#     --workdir=/home/me/bucket/pretrain --config.data.path=... \
#     --config.mesh.fsdp=-1
#
# The hosts find each other (qi2_jax/parallel/distributed.py). Workdir and
# data must be on storage that all hosts see under the same path.
#
# --name, --zone   as for create.sh
# --repo           git URL to clone on hosts that have no checkout yet
# --ref            branch or tag of it (main)
# --bucket         bucket to mount at ~/bucket (see bootstrap.sh)
# --run            name of the log and status files (train)
# --dry-run        prints every command and runs none
#
# Logs: gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=0 \
#         --command="tail -f qi2_jax/runs/hosts/train.log"
# To stop (all hosts save the same step), send SIGTERM on any of them:
#         --command='kill -- -$(cat qi2_jax/runs/hosts/train.pid)'
set -euo pipefail
# shellcheck source=tpu_setup/common.sh
. "$(dirname "$0")/common.sh"

NAME='' ZONE='' REPO='' REF=main BUCKET='' RUN=train
parse "name zone repo ref bucket run" "$@"
need "name zone repo"
((${#WORDS[@]})) || fail "no command after --; see --help."

on_all_hosts() {
  run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
    --command="$1"
}

printf -v clone 'git clone --quiet --branch %q %q qi2_jax' "$REF" "$REPO"
printf -v command ' %q' "${WORDS[@]}"
printf -v bucket '%q' "$BUCKET"

# bootstrap.sh leaves .venv behind early, so its end is marked here.
on_all_hosts "set -e; test -d qi2_jax || $clone; cd qi2_jax; \
test -e .venv/.ready || { bash tpu_setup/bootstrap.sh ${BUCKET:+--bucket=$bucket}; \
touch .venv/.ready; }"
on_all_hosts "cd qi2_jax && bash tpu_setup/host_run.sh --run=$RUN --$command"
