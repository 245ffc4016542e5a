# SPDX-License-Identifier: Apache-2.0
"""Files of a shard appear together, or not at all."""

import json
import sys

import pyarrow as pa
import pytest

from data_pipelines.engine import shards
from data_pipelines.errors import InputError

TABLE = pa.table({"id": ["a", "b"]})


def _write(folder, fingerprint="f", table=TABLE):
  with shards.write(folder, "part-00000", fingerprint) as shard:
    writer = shard.records()
    for text in (b"one", b"two"):
      writer.write(text)
    shard.table(table)
    shard.counts = {"ok": 2}


def _names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_a_shard_is_complete_and_says_so(tmp_path):
  _write(tmp_path)
  assert _names(tmp_path) == [
    "part-00000.array_record", "part-00000.done.json", "part-00000.parquet",
  ]  # fmt: skip
  assert shards.is_done(tmp_path, "part-00000", "f")
  assert not shards.is_done(tmp_path, "part-00000", "g")
  assert not shards.is_done(tmp_path, "part-00001", "f")
  assert shards.read_marker(tmp_path, "part-00000")["counts"] == {"ok": 2}
  path = tmp_path / "part-00000.array_record"
  assert list(shards.read_records(path)) == [b"one", b"two"]
  # The same content has the same bytes.
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  _write(tmp_path)
  assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_an_error_inside_leaves_what_was_there(tmp_path):
  _write(tmp_path)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  with pytest.raises(ZeroDivisionError):
    with shards.write(tmp_path, "part-00000", "g") as shard:
      shard.records().write(b"other")
      shard.table(TABLE)
      raise ZeroDivisionError
  assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_no_marker_vouches_for_a_mixture(tmp_path, monkeypatch):
  """Killed between two renames, the shard counts as missing."""
  _write(tmp_path)
  replace, calls = shards.os.replace, []

  def die(source, target):
    calls.append(target)
    if len(calls) == 2:
      raise KeyboardInterrupt  # as abrupt as a test can be
    replace(source, target)

  monkeypatch.setattr(shards.os, "replace", die)
  with pytest.raises(KeyboardInterrupt):
    _write(tmp_path, "f", pa.table({"id": ["c"]}))
  assert not shards.is_done(tmp_path, "part-00000", "f")


def test_lost_or_cut_files_are_noticed(tmp_path):
  _write(tmp_path)
  path = tmp_path / "part-00000.parquet"
  data = path.read_bytes()
  path.write_bytes(data[:-1])
  assert not shards.is_done(tmp_path, "part-00000", "f")
  path.unlink()
  assert not shards.is_done(tmp_path, "part-00000", "f")
  path.write_bytes(data)
  assert shards.is_done(tmp_path, "part-00000", "f")
  marker = tmp_path / "part-00000.done.json"
  for text in ("", "[]", "{}", json.dumps({"files": 3})):
    marker.write_text(text)
    assert not shards.is_done(tmp_path, "part-00000", "f")
  with pytest.raises(InputError, match="is not complete; run the verb"):
    shards.sha256_of(tmp_path, "part-00000", ".parquet")


def test_failed_writes_are_one_sentence(tmp_path):
  with pytest.raises(InputError, match=r"failed .*check the free space"):
    with shards.write(tmp_path, "part-00000", "f"):
      raise OSError(28, "No space left on device")
  with pytest.raises(InputError, match=r"failed .*check the free space"):
    with shards.write(tmp_path / "part", "part-00000", "f") as shard:
      (tmp_path / "part").rmdir()
      shard.table(TABLE)
  assert _names(tmp_path) == []


def test_leftovers_and_surplus_are_removed(tmp_path):
  _write(tmp_path)
  for name in (
    "part-00000.parquet.tmp-1234", "part-00007.parquet", "part-00007.done.json",
    "plan.json",
  ):  # fmt: skip
    (tmp_path / name).write_text("")
  shards.clean(tmp_path, shards.names(1))
  assert _names(tmp_path) == [
    "part-00000.array_record", "part-00000.done.json", "part-00000.parquet",
    "plan.json",
  ]  # fmt: skip
  shards.clean(tmp_path / "absent", shards.names(1))


def test_damaged_records_are_named(tmp_path):
  _write(tmp_path)
  path = tmp_path / "part-00000.array_record"
  data = bytearray(path.read_bytes())
  at = data.index(b"one")
  data[at : at + 3] = b"ONE"
  path.write_bytes(bytes(data))
  with pytest.raises(InputError, match="is damaged"):
    list(shards.read_records(path))


def test_code_versions_follow_the_source(tmp_path, monkeypatch):
  package = tmp_path / "some_package"
  package.mkdir()
  (package / "__init__.py").write_text("")
  (package / "one.py").write_text("x = 1")
  monkeypatch.syspath_prepend(tmp_path)
  module = shards.code_version("some_package.one")
  whole = shards.code_version("some_package")
  (package / "two.py").write_text("y = 1")
  assert shards.code_version("some_package.one") == module
  assert shards.code_version("some_package") != whole
  (package / "one.py").write_text("x = 2")
  assert shards.code_version("some_package.one") != module
  sys.modules.pop("some_package", None)
