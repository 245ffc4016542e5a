# SPDX-License-Identifier: Apache-2.0
"""Several processes as one program: start, work of one, votes, fetching.

On a TPU pod the workers find each other. Elsewhere (GPU hosts, tests) three
environment variables say it, the same names as in JAX's documentation:

    JAX_COORDINATOR_ADDRESS   host:port of process 0
    JAX_NUM_PROCESSES         how many processes there are
    JAX_PROCESS_ID            which one this is, from 0

Without them there is one process and nothing here communicates.
"""

import collections
import glob
import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qi2_jax.errors import InputError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Votes read this many steps later; by then the loop has waited for the step,
# so that voting never stalls the device.
_VOTE_LAG = 2
# JAX's own timeout aborts the process, so ours comes first.
_SPARE_SECONDS = 30


def initialise(timeout_seconds: int = 300) -> None:
  """Joins the other processes; call it once, before any device is touched.

  When the others do not answer in time, the process ends with one sentence
  and status 2: the library below would abort it with a stack trace.

  Args:
    timeout_seconds: how long to wait for the others.

  Raises:
    InputError: the environment is incomplete or wrong.
  """
  settings = explicit_settings(os.environ)
  if settings is None and tpu_workers(os.environ) < 2:
    return
  who = "this TPU worker cannot join the others of its slice"
  if settings:
    who = (
      f"process {settings['process_id']} of {settings['num_processes']} "
      f"cannot join at {settings['coordinator_address']}"
    )
  remedy = (
    "start the same command on every host, with the same address and an open "
    "port."
  )
  late = f"{who} within {timeout_seconds} s; {remedy}"
  timer = threading.Timer(timeout_seconds, _give_up, [late])
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      **settings or {},
      initialization_timeout=timeout_seconds + _SPARE_SECONDS,
      # One process that fails must not hold the exit of all others for long.
      shutdown_timeout_seconds=60,
    )
  except (RuntimeError, ValueError, OSError) as error:
    reason = str(error).strip().splitlines()[0]
    raise InputError(f"{who} ({reason}); {remedy}") from error
  finally:
    timer.cancel()


def _give_up(sentence: str) -> None:
  """Ends the process from a thread: its main thread waits inside a library."""
  print(f"error: {sentence}", file=sys.stderr, flush=True)
  os._exit(2)


def explicit_settings(environ: Mapping[str, str]) -> dict | None:
  """Arguments of `jax.distributed.initialize`, or None without variables.

  Raises:
    InputError: some variables are missing or are no numbers.
  """
  values = [environ.get(name, "") for name in VARIABLES]
  if not any(values):
    return None
  if not all(values):
    missing = [n for n, value in zip(VARIABLES, values) if not value]
    raise InputError(
      f"several processes need {', '.join(VARIABLES)}, but "
      f"{' and '.join(missing)} is not set; set all three or none."
    )
  address, count, index = values
  if ":" not in address:
    raise InputError(
      f"JAX_COORDINATOR_ADDRESS={address} has no port; write host:port."
    )
  if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
    raise InputError(
      f"JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID={index} are not a count "
      "and an index below it; count processes from 0."
    )
  return {
    "coordinator_address": address,
    "num_processes": int(count),
    "process_id": int(index),
  }


def tpu_workers(environ: Mapping[str, str]) -> int:
  """The number of hosts of this TPU, 1 on any other machine.

  GKE (and xpk) name the hosts in the environment, TPU VMs in the metadata
  server; both say how many slices there are.
  """
  platforms = environ.get("JAX_PLATFORMS", "")
  if platforms and "tpu" not in platforms:
    return 1
  names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get(
    "TPU_WORKER_HOSTNAMES"
  )
  slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
  if not names and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")):
    names = _metadata("worker-network-endpoints", environ)
    for line in _metadata("tpu-env", environ).splitlines():
      if line.startswith("MEGASCALE_NUM_SLICES"):
        slices = int(line.split(":")[1].strip().strip("'"))
  return slices * len(names.split(",")) if names else slices


def _metadata(key: str, environ: Mapping[str, str]) -> str:
  """One attribute of this machine from its metadata server, or ''."""
  host = environ.get("GCE_METADATA_IP", "metadata.google.internal")
  request = urllib.request.Request(
    f"http://{host}/computeMetadata/v1/instance/attributes/{key}",
    headers={"Metadata-Flavor": "Google"},
  )
  try:
    with urllib.request.urlopen(request, timeout=5) as answer:
      return answer.read().decode()
  except (urllib.error.URLError, TimeoutError):
    return ""  # Notebook services have chips and no such server.


def on_first(work: Callable[[], None]) -> None:
  """Runs `work` on process 0 while the others wait for it.

  Raises:
    InputError: on the others, when it failed on process 0.
  """
  error = None
  if jax.process_index() == 0:
    try:
      work()
    except Exception as raised:
      error = raised
  if jax.process_count() == 1:
    fine = error is None
  else:
    fine = multihost_utils.broadcast_one_to_all(np.int32(error is None))
  if error is not None:
    raise error
  if not fine:
    raise InputError("process 0 failed; see its log.")


def batch_share(mesh: Mesh) -> tuple[int, int]:
  """Which part of a global batch this process feeds: `(index, count)`.

  Processes that hold the same rows (sequence or tensor axes over hosts) have
  the same index and must read the same data.

  Raises:
    InputError: the mesh cuts batches unevenly over processes.
  """
  # Batches are split over the first two axes (see `sharding.py`).
  grid = mesh.devices.reshape(np.prod(mesh.devices.shape[:2]), -1)
  rows = collections.defaultdict(set)
  for row, devices in enumerate(grid):
    for device in devices:
      rows[device.process_index].add(row)
  parts = sorted({tuple(sorted(part)) for part in rows.values()})
  if sum(map(len, parts)) != len(grid) or len(set(map(len, parts))) > 1:
    raise InputError(
      f"mesh {dict(mesh.shape)} cuts batches unevenly over the processes; "
      "let seq x tensor divide, or be a multiple of, the devices of a host."
    )
  own = tuple(sorted(rows[jax.process_index()]))
  return parts.index(own), len(parts)


def to_host(tree):
  """Whole arrays on every host, as numpy, wherever their shards lie."""

  def one(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(one, tree)


class StopVote:
  """Lets all processes stop after the same step.

  A signal reaches one process, and the others would wait for it forever in
  their next collective. So every process votes before every step; the
  answer is the largest vote cast a few steps ago.
  """

  def __init__(self, mesh: Mesh):
    spec = PartitionSpec(mesh.axis_names)
    self._sharding = NamedSharding(mesh, spec)
    self._local = len(mesh.local_devices)
    self._max = jax.jit(
      jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec())
    )
    self._votes = collections.deque()

  def __call__(self, signal: int) -> int:
    """Casts the vote `signal` (0: go on); returns what all agreed on."""
    if jax.process_count() == 1:
      return signal
    votes = np.full(self._local, signal, np.int32)
    votes = jax.make_array_from_process_local_data(self._sharding, votes)
    self._votes.append(self._max(votes))
    if len(self._votes) <= _VOTE_LAG:
      return 0
    return int(self._votes.popleft())
