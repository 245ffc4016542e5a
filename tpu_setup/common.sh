#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What the scripts of this folder share; they source it, nobody runs it.
#
#   common.sh --help | --dry-run    both print this text
#
# parse NAMES ARGUMENTS...  reads --name=value for every name in NAMES into a
#                           variable of that name in capitals, --dry-run,
#                           --help (prints the caller's head), and the words
#                           after -- into WORDS
# run COMMAND...            prints the command, and runs it unless --dry-run
# need NAMES                ends with one sentence if a value is empty
set -euo pipefail

DRY_RUN=
WORDS=()

fail() {
  echo "error: $*" >&2
  exit 2
}

usage() {
  # The comment block under the SPDX line is the help text.
  sed -n '3,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
}

# Not ${name^^}: the bash of macOS is too old.
capitals() {
  tr '[:lower:]' '[:upper:]' <<<"$1"
}

parse() {
  local names=" $1 " name
  shift
  while (($#)); do
    case $1 in
      --help | -h)
        usage
        exit 0
        ;;
      --dry-run) DRY_RUN=1 ;;
      --)
        shift
        # The scripts that source this file read WORDS.
        # shellcheck disable=SC2034
        WORDS=("$@")
        return
        ;;
      --*=*)
        name=${1%%=*}
        name=${name#--}
        [[ $names == *" $name "* ]] || fail "unknown flag $1; see --help."
        printf -v "$(capitals "$name")" '%s' "${1#*=}"
        ;;
      *) fail "unknown argument $1; see --help." ;;
    esac
    shift
  done
}

need() {
  local name variable
  for name in $1; do
    variable=$(capitals "$name")
    [[ -n ${!variable} ]] || fail "--$name is missing; see --help."
  done
}

run() {
  local line
  printf -v line ' %q' "$@"
  echo "+$line"
  [[ -n $DRY_RUN ]] || "$@"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  usage
fi
