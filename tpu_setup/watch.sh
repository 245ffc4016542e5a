#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Keeps a run going: starts it, looks after it, restarts it when it was
# stopped, crashed or lost its slice, and ends when it ends.
#
#   tpu_setup/watch.sh --name=qi2 --zone=us-east5-a --type=v5p-128 --spot=1 \
#     --repo=URL -- python -m qi2_jax.train ...
#
# The flags are those of create.sh and launch.sh, and
# --every      seconds between looks (60)
# --restarts   how often to restart before giving up (1000)
# --crashes    crashes within --minutes, without a newer checkpoint, after
#              which a restart would not help (3)
# --minutes    see there (180)
# --dry-run    prints the commands of one start, one look, one restart after a
#              crash and one on a new slice
#
# What the run's exit status on host 0 means:
#   0            finished: this script ends with 0
#   143          stopped by SIGTERM, state saved: restart
#   130          stopped by a person (SIGINT), state saved: ends with 130
#   128 and up   a crash, e.g. 134 for a lost heartbeat: restart after a pause
#                that doubles, until --crashes is reached
#   other        a failure: shows the log's end and ends with that status,
#                unless the slice is gone
# Newer checkpoints are looked for in the command's --workdir.
# A slice that is gone (PREEMPTED, SUSPENDED, ...) is deleted and asked for
# again; the run resumes from its last checkpoint, which must therefore be on
# storage outside the slice.
set -euo pipefail
here=$(dirname "$0")
# shellcheck source=tpu_setup/common.sh
. "$here/common.sh"

NAME='' ZONE='' TYPE='' SPOT='' RUNTIME='' REPO='' REF=main BUCKET='' RUN=train
EVERY=60 RESTARTS=1000 CRASHES=3 MINUTES=180
parse "name zone type spot runtime repo ref bucket run every restarts crashes \
minutes" "$@"
need "name zone type repo"
((${#WORDS[@]})) || fail "no command after --; see --help."

dry=${DRY_RUN:+--dry-run}

create() {
  bash "$here/create.sh" --name="$NAME" --zone="$ZONE" --type="$TYPE" \
    --spot="$SPOT" --runtime="$RUNTIME" --wait="$EVERY" ${dry:+"$dry"}
}

delete() {
  bash "$here/delete.sh" --name="$NAME" --zone="$ZONE" ${dry:+"$dry"}
}

launch() {
  bash "$here/launch.sh" --name="$NAME" --zone="$ZONE" --repo="$REPO" \
    --ref="$REF" --bucket="$BUCKET" --run="$RUN" ${dry:+"$dry"} \
    -- "${WORDS[@]}"
}

on_host_0() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 \
    --command="$1" 2>/dev/null
}

# Prints the queue's state, or GONE where there is none.
slice_state() {
  gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
    --format='value(state.state)' 2>/dev/null || echo GONE
}

# Prints the node's own state: a preempted one may precede the queue's news.
node_state() {
  gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" \
    --format='value(state)' 2>/dev/null || echo GONE
}

slice_is_gone() {
  [[ $(slice_state) != ACTIVE || $(node_state) != READY ]]
}

# Prints what is known of the run: nothing, its exit status, or UNREACHABLE.
run_status() {
  on_host_0 "cat qi2_jax/runs/hosts/$RUN.status 2>/dev/null || true" ||
    echo UNREACHABLE
}

# The folder after --workdir in the command, quoted for a remote shell.
workdir() {
  local i
  for ((i = 0; i < ${#WORDS[@]}; i++)); do
    case ${WORDS[i]} in
      --workdir=*) printf '%q' "${WORDS[i]#*=}" ;;
      --workdir) printf '%q' "${WORDS[i + 1]:-}" ;;
    esac
  done
}

# What prints the newest checkpoint's step, on host 0.
look_for_steps="cd qi2_jax && ls $(workdir)/checkpoints 2>/dev/null | \
grep -x '[0-9]*' | sort -n | tail -n 1"

# A crash on one host leaves the others waiting for it, and launch.sh would
# find them still going on. The group is ours only if its environment says so.
end_leftovers="cd qi2_jax && pid=\$(cat runs/hosts/$RUN.pid) && \
grep -qzxF 'QI2_BASE=runs/hosts/$RUN' /proc/\$pid/environ 2>/dev/null && \
kill -KILL -- -\$pid || true"

# Notes a crash; fails when there were too many for another attempt.
NEWEST=0 TIMES=''
may_restart() {
  local newest now=$SECONDS time recent=''
  newest=$(on_host_0 "$look_for_steps" || true)
  if [[ $newest =~ ^[0-9]+$ ]] && ((newest > NEWEST)); then
    NEWEST=$newest
    TIMES=''
  fi
  for time in $TIMES $now; do
    if ((now - time <= MINUTES * 60)); then
      recent+=" $time"
    fi
  done
  TIMES=$recent
  COUNT=$(wc -w <<<"$TIMES")
  ((COUNT < CRASHES))
}

show_log() {
  on_host_0 "tail -n 30 qi2_jax/runs/hosts/$RUN.log" >&2 || true
}

# Leaves a slice that is there alone; asks again for one that is gone.
ensure_slice() {
  case $(slice_state) in
    ACTIVE)
      case $(node_state) in
        READY) return ;;
      esac
      delete
      ;;
    GONE) ;;
    FAILED | SUSPENDING | SUSPENDED) delete ;;
    *) ;; # Still in the queue: create.sh would be refused, so wait below.
  esac
  if [[ $(slice_state) == GONE ]]; then
    create
  fi
  until [[ $(slice_state) == ACTIVE ]]; do
    sleep "$EVERY"
  done
}

if [[ -n $DRY_RUN ]]; then
  create
  launch
  run gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
    '--format=value(state.state)'
  run gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" \
    '--format=value(state)'
  run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 \
    --command="cat qi2_jax/runs/hosts/$RUN.status 2>/dev/null || true"
  run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 \
    --command="$look_for_steps"
  run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
    --command="$end_leftovers"
  launch
  delete
  create
  launch
  exit 0
fi

for ((attempt = 0; attempt <= RESTARTS; attempt++)); do
  ensure_slice
  launch || echo "$(date +%T) the start failed; looking again" >&2
  while true; do
    sleep "$EVERY"
    status=$(run_status)
    case $status in
      '')
        ;;
      0)
        echo "$(date +%T) run $RUN finished"
        exit 0
        ;;
      143)
        echo "$(date +%T) run $RUN was stopped and has saved; restarting"
        break
        ;;
      130)
        echo "$(date +%T) run $RUN was stopped by a person and has saved"
        exit 130
        ;;
      UNREACHABLE)
        if slice_is_gone; then
          echo "$(date +%T) the slice is gone; asking for another"
          break
        fi
        ;;
      *)
        # Without its other hosts a process aborts, so look at them first.
        if slice_is_gone; then
          echo "$(date +%T) the slice is gone; asking for another"
          break
        fi
        if ((status < 128)); then
          echo "$(date +%T) run $RUN failed with status $status; log:" >&2
          show_log
          exit "$status"
        fi
        if ! may_restart; then
          echo "$(date +%T) run $RUN crashed $COUNT times without a newer" \
            "checkpoint, at last with status $status; log:" >&2
          show_log
          exit "$status"
        fi
        echo "$(date +%T) run $RUN crashed with status $status; restarting"
        sleep $((EVERY * 2 ** (COUNT < 5 ? COUNT : 5)))
        gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
          --command="$end_leftovers" || true
        break
        ;;
    esac
  done
done
fail "gave up after $RESTARTS restarts."
