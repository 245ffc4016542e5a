# SPDX-License-Identifier: Apache-2.0
"""Running the scripts of tpu_setup, for real or against a pretended gcloud."""

import os
import pathlib
import shutil
import subprocess
import time

ROOT = pathlib.Path(__file__).parents[1]
WHERE = ("--name=qi2", "--zone=us-east5-a")
REPO = "--repo=https://example.org/qi2_jax.git"
TRAIN = ("python", "-m", "qi2_jax.train", "--workdir=/a b/run")


def bash(script: str, *arguments: str, root=ROOT, **environ: str):
  """Runs one script from another folder, as anyone would."""
  return subprocess.run(
    ["bash", str(root / "tpu_setup" / script), *arguments], text=True,
    capture_output=True, cwd="/", env=os.environ | environ, timeout=60,
  )  # fmt: skip


def words(line: str) -> list[str]:
  """The words of a printed command, as bash reads them."""
  code = f"printf '%s\\0' {line}"
  out = subprocess.run(["bash", "-c", code], capture_output=True, check=True)
  return out.stdout.decode().split("\0")[:-1]


def printed(script: str, *arguments: str) -> list[list[str]]:
  """The commands that a dry run prints; it must run none of them."""
  done = bash(script, "--dry-run", *arguments, PATH="/usr/bin:/bin")
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert lines and all(line.startswith("+ ") for line in lines)
  return [words(line[2:]) for line in lines]


def copy_scripts(folder) -> pathlib.Path:
  """A copy of the scripts, so that logs go elsewhere."""
  shutil.copytree(ROOT / "tpu_setup", folder / "repo" / "tpu_setup")
  return folder / "repo"


def wait_for(path) -> str:
  for _ in range(200):
    if path.exists():
      return path.read_text()
    time.sleep(0.05)
  raise AssertionError(f"{path} did not appear")


FAKE_GCLOUD = """#!/usr/bin/env bash
# Answers from lines of $FAKE/VERB, the last one again and again.
cd "$FAKE"
echo "$3 $4" >> calls
key=$4
[[ $3 == tpu-vm && $4 == describe ]] && key=node
[[ $4 == ssh && "$*" == *status* ]] && key=status
[[ $4 == ssh && "$*" == *.log* ]] && key=tail
[[ $4 == ssh && "$*" == *checkpoints* ]] && key=steps
[[ $4 == ssh && "$*" == *KILL* ]] && key=kill && echo kill >> kills
[[ -e $key ]] || exit 0
line=$(head -n 1 "$key")
[[ $(wc -l < "$key") -gt 1 ]] && sed -i 1d "$key"
[[ $line == GONE ]] && exit 1
echo "$line"
"""


def pretend_gcloud(folder) -> pathlib.Path:
  """A folder of answers for a gcloud that only pretends."""
  (folder / "bin").mkdir()
  gcloud = folder / "bin" / "gcloud"
  gcloud.write_text(FAKE_GCLOUD)
  gcloud.chmod(0o755)
  return folder
