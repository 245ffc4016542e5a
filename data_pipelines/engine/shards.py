# SPDX-License-Identifier: Apache-2.0
"""Files of a shard that appear all together, or not at all.

They are written under temporary names, renamed, and vouched for by a marker
that comes last:

    part-00000.array_record, part-00000.parquet, ...
    part-00000.done.json     fingerprint of what made them, counts, checksums

The fingerprint covers the configuration, the code and the input, so a shard
is made again exactly when one of them changes.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import pathlib
import uuid
from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python import array_record_module

from data_pipelines.errors import InputError
from data_pipelines.sources.items import digest

TEMPORARY = ".tmp-"
# Images are compressed already; group_size:1 makes random reads cheap.
_OPTIONS = "group_size:1,uncompressed"


def name(index: int) -> str:
  """Name of the files of a shard, without suffix."""
  return f"part-{index:05d}"


def names(count: int) -> list[str]:
  """Names of so many shards, in order."""
  return [name(i) for i in range(count)]


class Shard:
  """What a verb fills in while it writes a shard.

  Attributes:
    counts: plain JSON for the marker.
  """

  def __init__(self, folder: pathlib.Path, stem: str):
    """See `write`."""
    self._folder = folder
    self._stem = stem
    self._unique = uuid.uuid4().hex[:8]
    self._suffixes: list[str] = []
    self._closers: list[Any] = []
    self.counts: dict[str, Any] = {}

  def path(self, suffix: str) -> pathlib.Path:
    """Temporary path of the file that will end in `suffix`."""
    if suffix not in self._suffixes:
      self._suffixes.append(suffix)
    return self._temporary(suffix)

  def records(self, suffix: str = ".array_record") -> Any:
    """A writer of records: `write(bytes)`."""
    writer = array_record_module.ArrayRecordWriter(
      str(self.path(suffix)), _OPTIONS
    )
    self._closers.append(writer)
    return writer

  def table(self, rows: pa.Table, suffix: str = ".parquet") -> None:
    """Writes a table."""
    pq.write_table(rows, self.path(suffix))

  def _temporary(self, suffix: str) -> pathlib.Path:
    base = f"{self._stem}{suffix}{TEMPORARY}{self._unique}"
    return self._folder / base

  def commit(self, fingerprint: str) -> None:
    """Renames the files and writes the marker."""
    for writer in self._closers:
      writer.close()
    files = {s: _describe(self._temporary(s)) for s in self._suffixes}
    marker = marker_path(self._folder, self._stem)
    # An old marker must not vouch for a mixture of old and new files.
    marker.unlink(missing_ok=True)
    for suffix in self._suffixes:
      os.replace(
        self._temporary(suffix), self._folder / f"{self._stem}{suffix}"
      )
    value = {"fingerprint": fingerprint, "counts": self.counts, "files": files}
    write_json(marker, value)

  def discard(self) -> None:
    """Removes what was not committed."""
    for writer in self._closers:
      with contextlib.suppress(RuntimeError):
        writer.close()
    for suffix in self._suffixes:
      self._temporary(suffix).unlink(missing_ok=True)


@contextlib.contextmanager
def write(folder: pathlib.Path, stem: str, fingerprint: str) -> Iterator[Shard]:
  """Writes the files of a shard; complete after the block, else unchanged.

  Raises:
    InputError: writing failed, as on a full disk.
  """
  shard = Shard(folder, stem)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    yield shard
    shard.commit(fingerprint)
  # ArrayRecord raises RuntimeError, Arrow an OSError.
  except (OSError, RuntimeError) as error:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise InputError(
      f"Writing {folder / stem} failed ({text}); check the free space and run "
      "the same command again."
    ) from error
  finally:
    shard.discard()


def _describe(path: pathlib.Path) -> dict[str, Any]:
  with path.open("rb") as file:
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
  return {"sha256": sha256, "bytes": path.stat().st_size}


def marker_path(folder: pathlib.Path, stem: str) -> pathlib.Path:
  """The file that says that a shard is complete."""
  return folder / f"{stem}.done.json"


def read_marker(folder: pathlib.Path, stem: str) -> dict[str, Any] | None:
  """The marker of a shard, or None unless its files are there in full."""
  try:
    text = marker_path(folder, stem).read_text(encoding="utf-8")
    marker = json.loads(text)
    for suffix, file in marker["files"].items():
      size = (folder / f"{stem}{suffix}").stat().st_size
      if size != file["bytes"]:
        return None
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return None
  return marker


def is_done(folder: pathlib.Path, stem: str, fingerprint: str) -> bool:
  """Whether a shard is complete and was made by the same."""
  marker = read_marker(folder, stem)
  return marker is not None and marker["fingerprint"] == fingerprint


def sha256_of(folder: pathlib.Path, stem: str, suffix: str) -> str:
  """Checksum of a file of a complete shard, from its marker.

  Raises:
    InputError: the shard is not complete.
  """
  marker = read_marker(folder, stem)
  if marker is None or suffix not in marker["files"]:
    raise InputError(
      f"Shard {folder / stem} is not complete; run the verb {folder.name!r} "
      "first (--verbs)."
    )
  return marker["files"][suffix]["sha256"]


def sweep(folder: pathlib.Path) -> None:
  """Removes what killed processes left; the folder may be absent."""
  for path in folder.glob(f"*{TEMPORARY}*"):
    path.unlink(missing_ok=True)


def clean(folder: pathlib.Path, stems: Collection[str]) -> None:
  """Removes what killed processes left, and shards that are no more.

  Args:
    folder: of a verb; may be absent.
    stems: of the shards that there are.
  """
  sweep(folder)
  for path in folder.glob("part-*"):
    if path.name.partition(".")[0] not in stems:
      path.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON under a temporary name, then renames."""
  temporary = path.with_name(f"{path.name}{TEMPORARY}{uuid.uuid4().hex[:8]}")
  try:
    # In ASCII, because file names need not be valid Unicode.
    text = json.dumps(value, indent=2)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def code_version(*modules: str) -> str:
  """SHA-256 over the source of modules and packages.

  A version number would have to be raised by hand with every change.
  """
  files: set[pathlib.Path] = set()
  for module in modules:
    spec = importlib.util.find_spec(module)
    if spec.submodule_search_locations:
      files.update(pathlib.Path(spec.origin).parent.glob("*.py"))
    else:
      files.add(pathlib.Path(spec.origin))
  texts = [file.read_text(encoding="utf-8") for file in sorted(files)]
  return digest(*texts)


def read_records(path: pathlib.Path) -> Iterator[bytes]:
  """The records of an ArrayRecord file, in order.

  Raises:
    InputError: the file is damaged.
  """
  reader = array_record_module.ArrayRecordReader(str(path))
  try:
    for _ in range(reader.num_records()):
      yield reader.read()
  except RuntimeError as error:
    raise InputError(
      f"{path} is damaged ({error}); delete it and run the same command again."
    ) from error
  finally:
    with contextlib.suppress(RuntimeError):
      reader.close()
