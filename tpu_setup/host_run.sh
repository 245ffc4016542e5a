#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Starts a command in the background of one host, beyond the end of the ssh
# connection. launch.sh runs it on every host.
#
#   tpu_setup/host_run.sh --run=NAME [--accelerator=tpu] -- COMMAND...
#
# runs/hosts/NAME.log      what the command prints (the last run's in .log.1)
# runs/hosts/NAME.pid      its process
# runs/hosts/NAME.status   its exit status, once it has ended
# --dry-run                prints every command and runs none
set -euo pipefail
# shellcheck source=tpu_setup/common.sh
. "$(dirname "$0")/common.sh"

RUN='' ACCELERATOR=tpu
parse "run accelerator" "$@"
need "run"
cd "$(dirname "$0")/.."
((${#WORDS[@]})) || fail "no command after --; see --help."

base=runs/hosts/$RUN
if [[ -z $DRY_RUN ]]; then
  if [[ -e $base.pid && ! -e $base.status ]] &&
    kill -0 "$(<"$base.pid")" 2>/dev/null; then
    fail "run $RUN is still going on here; stop it or choose another name."
  fi
  mkdir -p runs/hosts
  if [[ -e $base.log ]]; then
    mv "$base.log" "$base.log.1"
  fi
  rm -f "$base.status"
fi
# The status appears under its name only when complete.
# shellcheck disable=SC2016
run env QI2_BASE="$base" QI2_ACCELERATOR="$ACCELERATOR" \
  setsid --fork bash -c '
    # ssh ends when nobody holds its output any more.
    exec > "$QI2_BASE.log" 2>&1 < /dev/null
    # A signal to the group reaches the command; its status is still noted.
    trap : TERM INT
    echo $$ > "$QI2_BASE.pid"
    if [ -d .venv/bin ]; then PATH=$PWD/.venv/bin:$PATH; fi
    . tpu_setup/env.sh "$QI2_ACCELERATOR"
    "$@"
    echo $? > "$QI2_BASE.status.tmp"
    mv "$QI2_BASE.status.tmp" "$QI2_BASE.status"
  ' host_run "${WORDS[@]}"
