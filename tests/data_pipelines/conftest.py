# SPDX-License-Identifier: Apache-2.0
"""What tests of whole stages share."""

import pytest
from caption_server import Server, well_behaved
from stages import config, mixed_input, run

from data_pipelines.engine import beam


@pytest.fixture
def verbs(monkeypatch):
  """Labels of the verbs that had shards to make, with their number."""
  found = []
  execute = beam.execute

  def note(label, folder, function, tasks, runner, arguments):
    found.append((label, len(tasks)))
    execute(label, folder, function, tasks, runner, arguments)

  monkeypatch.setattr(beam, "execute", note)
  return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """One run over the mixed input, not to be changed."""
  path = tmp_path_factory.mktemp("stage")
  where = mixed_input(path / "in")
  cfg = config(filters__edit__min_edit_similarity=None)
  return path, where, cfg, run(path / "out", where, config=cfg)


@pytest.fixture
def serve():
  """Starts servers of captions; see `caption_server.Server`."""
  servers = []

  def start(reply=well_behaved):
    servers.append(Server(reply))
    return servers[-1]

  yield start
  for server in servers:
    server.close()
