# SPDX-License-Identifier: Apache-2.0
"""Start-up settings, shares of the batch, and what one process does."""

import dataclasses
import functools
import http.server
import os
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qi2_jax.errors import InputError
from qi2_jax.parallel import distributed
from qi2_jax.parallel.mesh import AXES, create_mesh

COMPLETE = dict(zip(distributed.VARIABLES, ("10.0.0.1:8476", "4", "3")))


def test_explicit_settings():
  assert distributed.explicit_settings({}) is None
  assert distributed.explicit_settings(COMPLETE) == {
    "coordinator_address": "10.0.0.1:8476",
    "num_processes": 4,
    "process_id": 3,
  }


@pytest.mark.parametrize(
  "change, message",
  [
    ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is not set"),
    ({"JAX_PROCESS_ID": "4"}, "count processes from 0"),
    ({"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES=four"),
    ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "has no port"),
  ],
)
def test_bad_settings_are_one_sentence(change, message):
  with pytest.raises(InputError, match=message):
    distributed.explicit_settings(COMPLETE | change)


@pytest.mark.parametrize(
  "environ, count",
  [
    ({}, 1),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
    ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 4),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "3"}, 6),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, 1),
  ],
)
def test_workers_named_in_the_environment(environ, count, monkeypatch):
  monkeypatch.setattr(distributed.glob, "glob", lambda pattern: [])
  assert distributed.tpu_workers(environ) == count


class Metadata(http.server.BaseHTTPRequestHandler):
  """Answers as the metadata server of a TPU VM does."""

  answers = {  # noqa: RUF012
    "worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2",
    "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n",
  }

  def do_GET(self):
    key = self.path.rsplit("/", 1)[1]
    known = key in self.answers and self.headers["Metadata-Flavor"] == "Google"
    self.send_response(200 if known else 404)
    self.end_headers()
    self.wfile.write(self.answers.get(key, "").encode())

  def log_message(self, *_):
    pass


def test_workers_of_a_tpu_vm(monkeypatch):
  chips = lambda pattern: ["/dev/accel0"] if "accel" in pattern else []  # noqa: E731
  monkeypatch.setattr(distributed.glob, "glob", chips)
  with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environ = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
    assert distributed.tpu_workers(environ) == 4
    server.shutdown()
  # A notebook service: chips, but no such server.
  assert distributed.tpu_workers(environ) == 1


@pytest.mark.parametrize("process", [0, 3])
def test_missing_others_are_one_sentence(process):
  code = (
    "from qi2_jax.parallel import distributed\n"
    "distributed.initialise(timeout_seconds=1)\n"
  )
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  environ = COMPLETE | {
    "JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(process),
  }  # fmt: skip
  done = subprocess.run(
    [sys.executable, "-c", code], env=os.environ | environ, text=True,
    capture_output=True, timeout=60,
  )  # fmt: skip
  assert done.returncode == 2, done.stderr
  last = done.stderr.splitlines()[-1]
  assert last.startswith(
    f"error: process {process} of 4 cannot join at {address} within 1 s"
  )
  assert "start the same command on every host" in last


@dataclasses.dataclass(frozen=True)
class Device:
  """What `batch_share` asks of a device."""

  id: int
  process_index: int


@pytest.mark.parametrize(
  "shape, process, expected",
  [
    ((1, 8, 1, 1), 0, (0, 2)),
    ((1, 8, 1, 1), 1, (1, 2)),
    ((2, 4, 1, 1), 1, (1, 2)),
    ((1, 2, 1, 4), 1, (1, 2)),
    ((1, 1, 2, 4), 1, (0, 1)),  # Both processes hold all rows.
  ],
)
def test_batch_share(shape, process, expected, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: process)
  assert distributed.batch_share(fake_mesh(shape, lambda i: i // 4)) == expected


def fake_mesh(shape, process_of):
  """Eight devices in `shape`; the i-th belongs to process `process_of(i)`."""

  @dataclasses.dataclass
  class Fake:
    devices: np.ndarray
    shape: dict

  devices = np.empty(8, object)
  devices[:] = [Device(i, process_of(i)) for i in range(8)]
  return Fake(devices.reshape(shape), dict(zip(AXES, shape)))


def test_uneven_shares_are_refused():
  # Row 1 of three belongs to both processes, rows 0 and 2 to one each.
  mesh = fake_mesh((4, 1, 1, 2), lambda i: int(i > 2))
  with pytest.raises(InputError, match="unevenly"):
    distributed.batch_share(mesh)


def test_one_process_runs_work_itself():
  done = []
  distributed.on_first(functools.partial(done.append, 1))
  assert done == [1]
  with pytest.raises(OSError, match="full"):
    distributed.on_first(fail)
  mesh = create_mesh({"fsdp": -1})
  vote = distributed.StopVote(mesh)
  assert [vote(0), vote(15)] == [0, 15]
  assert distributed.batch_share(mesh) == (0, 1)


def fail():
  raise OSError("full")


def test_others_learn_that_process_0_failed(monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(
    distributed.multihost_utils, "broadcast_one_to_all", lambda x: np.int32(0)
  )
  with pytest.raises(InputError, match="process 0 failed"):
    distributed.on_first(fail)


def test_votes_are_counted_later(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
  vote = distributed.StopVote(mesh)
  lag = distributed._VOTE_LAG
  assert [vote(0) for _ in range(lag + 1)] == [0] * (lag + 1)
  assert [vote(15)] + [vote(0) for _ in range(lag)] == [0] * lag + [15]


def test_to_host_keeps_values():
  mesh = create_mesh({"fsdp": -1})
  sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
  x = jax.device_put(np.arange(16.0), sharding)
  out = distributed.to_host({"x": x, "y": np.ones(2)})
  assert isinstance(out["x"], np.ndarray)
  np.testing.assert_array_equal(out["x"], np.arange(16.0))
