# SPDX-License-Identifier: Apache-2.0
"""Safetensors files one tensor at a time, single or sharded, torch-free.

Written by hand because the library's writer needs every tensor in memory,
and because a memory-mapped view lets a transposing table decide which bytes
of a tensor are read, which the library's own slices cannot. The format is
an 8-byte little-endian length, a JSON header, then the raw arrays.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterable, Sequence

import ml_dtypes
import numpy as np
from absl import logging

from qi2_jax.errors import InputError

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_SECONDS_BETWEEN_LINES = 5.0
# Columns copied at once by `contiguous`; a few rows of them stay in cache.
_BLOCK = 256
_WRITE_BYTES = 8 * 2**20

# (name, shape, dtype) of every tensor of a folder, in writing order.
Plan = Sequence[tuple[str, tuple[int, ...], np.dtype]]


class Progress:
  """Log lines `what: 3.20 of 14.23 GB, 0.81 GB/s`, one every few seconds."""

  def __init__(self, what: str, total: int):
    """Starts the clock; `total` is in bytes."""
    self._what, self._total, self._done = what, total, 0
    self._start = self._last = time.monotonic()

  def add(self, size: int) -> None:
    """Counts `size` more bytes."""
    self._done += size
    now = time.monotonic()
    due = now - self._last >= _SECONDS_BETWEEN_LINES
    slow = now - self._start >= _SECONDS_BETWEEN_LINES
    if not due and not (slow and self._done >= self._total):
      return
    self._last = now
    logging.info(
      "%s: %.2f of %.2f GB, %.2f GB/s", self._what, self._done / 1e9,
      self._total / 1e9, self._done / 1e9 / max(now - self._start, 1e-9),
    )  # fmt: skip


def contiguous(array: np.ndarray) -> np.ndarray:
  """A C-ordered copy; transposes are 3 times as fast as numpy's own."""
  out = np.empty(array.shape, array.dtype)
  if array.ndim < 2:
    out[...] = array
    return out
  for start in range(0, array.shape[-1], _BLOCK):
    block = slice(start, start + _BLOCK)
    out[..., block] = array[..., block]
  return out


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where one tensor lies."""

  file: str
  offset: int
  shape: tuple[int, ...]
  dtype: np.dtype


class TensorReader:
  """The tensors of one component folder; nothing is read before it is asked.

  Attributes:
    names: of all tensors.
  """

  def __init__(self, places: dict[str, _Place]):
    """Use `open_tensors`."""
    self._places = places
    self.names = tuple(places)

  def shape(self, name: str) -> tuple[int, ...]:
    """Shape of a tensor."""
    return self._places[name].shape

  def dtype(self, name: str) -> np.dtype:
    """Type of a tensor; bfloat16 and float8 are those of ml_dtypes."""
    return self._places[name].dtype

  def view(self, name: str) -> np.ndarray:
    """Read-only memory map; pages are loaded when touched, freed with it."""
    place = self._places[name]
    if 0 in place.shape:
      return np.empty(place.shape, place.dtype)
    return np.memmap(
      place.file, place.dtype, "r", place.offset, place.shape or (1,)
    ).reshape(place.shape)

  def slice(self, name: str, index) -> np.ndarray:
    """Copies `tensor[index]`, reading only its pages."""
    return contiguous(self.view(name)[index])

  def read(self, name: str) -> np.ndarray:
    """Copies the whole tensor."""
    return self.slice(name, ...)


def open_tensors(folder: str, stem: str) -> TensorReader:
  """Opens `<stem>.safetensors` or its shards and checks every header.

  Args:
    folder: component folder.
    stem: `diffusion_pytorch_model` (diffusers) or `model` (transformers).

  Raises:
    InputError: no weights, a missing, truncated or corrupt shard, or a name
      that occurs twice.
  """
  index = os.path.join(folder, f"{stem}.safetensors.index.json")
  single = os.path.join(folder, f"{stem}.safetensors")
  if os.path.isfile(index):
    expected = _weight_map(index)
    files = sorted(set(expected.values()))
  elif os.path.isfile(single):
    expected, files = None, [os.path.basename(single)]
  else:
    raise InputError(
      f"{folder} has neither {stem}.safetensors nor its index; only "
      "safetensors weights are read, so download or convert them first."
    )
  for file in files:
    if not os.path.isfile(os.path.join(folder, file)):
      raise InputError(
        f"{index} names {file}, which is missing; download that file again."
      )
  places: dict[str, _Place] = {}
  for file in files:
    for name, place in _header(os.path.join(folder, file)).items():
      if name in places:
        raise InputError(
          f"tensor {name} is in {os.path.basename(places[name].file)} and in "
          f"{file} of {folder}; remove the files of the other download."
        )
      places[name] = place
  for name, file in (expected or {}).items():
    if name not in places or os.path.basename(places[name].file) != file:
      raise InputError(
        f"{index} promises tensor {name} in {file}, which does not hold it; "
        "download the index and that file again."
      )
  return TensorReader(places)


def _weight_map(path: str) -> dict[str, str]:
  try:
    with open(path, encoding="utf-8") as file:
      weight_map = json.load(file)["weight_map"]
    return {str(k): os.path.basename(v) for k, v in weight_map.items()}
  except (ValueError, KeyError, TypeError, AttributeError):
    raise InputError(
      f"{path} is no safetensors index; download it again."
    ) from None


def _unique(pairs):
  out = dict(pairs)
  if len(out) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(n for n in names if names.count(n) > 1)
    raise InputError(f"its header names {twice} twice; download it again.")
  return out


def _header(path: str) -> dict[str, _Place]:
  """Places of a file's tensors, checked against its size."""
  size = os.path.getsize(path)
  with open(path, "rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
      raise InputError(
        f"{path} is truncated inside its header ({size} bytes); download it "
        "again."
      )
    text = file.read(length)
  try:
    header = json.loads(text, object_pairs_hook=_unique)
    header.pop("__metadata__", None)
    spans = {n: (v["shape"], v["dtype"], *v["data_offsets"])
             for n, v in header.items()}  # fmt: skip
  except InputError as error:
    raise InputError(f"{path} is corrupt: {error}") from None
  except (ValueError, KeyError, TypeError, AttributeError):
    raise InputError(
      f"{path} is no safetensors file (unreadable header); download it again."
    ) from None
  end = 8 + length + max((span[3] for span in spans.values()), default=0)
  if end != size:
    raise InputError(
      f"{path} is truncated or corrupt: its header promises {end} bytes and "
      f"it has {size}; download it again."
    )
  places = {}
  for name, (shape, code, start, stop) in spans.items():
    if code not in DTYPES:
      raise InputError(
        f"{path} stores {name} as {code}, which is not supported; convert it "
        "to BF16 or F32 first."
      )
    dtype = DTYPES[code]
    if math.prod(shape) * dtype.itemsize != stop - start:
      raise InputError(
        f"{path} is corrupt: {name} of shape {shape} has {stop - start} "
        "bytes; download it again."
      )
    places[name] = _Place(path, 8 + length + start, tuple(shape), dtype)
  return places


def plan_bytes(plan: Plan) -> int:
  """Size of all tensors of a plan."""
  return sum(_nbytes(shape, dtype) for _, shape, dtype in plan)


def _nbytes(shape, dtype) -> int:
  return math.prod(shape) * np.dtype(dtype).itemsize


def _shards(plan: Plan, limit: int) -> list[list]:
  """Cuts a plan into runs of at most `limit` bytes (or one tensor)."""
  shards: list[list] = [[]]
  size = 0
  for item in plan:
    nbytes = _nbytes(*item[1:])
    if shards[-1] and size + nbytes > limit:
      shards.append([])
      size = 0
    shards[-1].append(item)
    size += nbytes
  return shards


def _layout(shard) -> tuple[bytes, dict[str, int]]:
  """Header bytes of a shard and the file offset of each tensor.

  Wide types come first: readers view raw bytes as the type, so every tensor
  must begin at a multiple of its item size.
  """
  header: dict = {"__metadata__": {"format": "pt"}}
  starts, offset = {}, 0
  for name, shape, dtype in sorted(
    shard, key=lambda item: -np.dtype(item[2]).itemsize
  ):
    stop = offset + _nbytes(shape, dtype)
    header[name] = {
      "dtype": _CODES[np.dtype(dtype)], "shape": list(shape),
      "data_offsets": [offset, stop],
    }  # fmt: skip
    starts[name], offset = offset, stop
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  start = 8 + len(text)
  return (
    len(text).to_bytes(8, "little") + text,
    {name: start + offset for name, offset in starts.items()},
  )


def write_tensors(
  folder: str, stem: str, plan: Plan,
  tensors: Iterable[tuple[str, np.ndarray]],
  max_shard_bytes: int = 5_000_000_000,
) -> None:  # fmt: skip
  """Streams tensors into one file, or into shards with an index.

  One tensor is in memory at a time. Files appear under their final names
  only when all are complete; on any error the temporary ones are removed.

  Args:
    folder: existing folder.
    stem: as in `open_tensors`; the files get the names diffusers and
      transformers give them.
    plan: `(name, shape, dtype)` of every tensor, known beforehand.
    tensors: `(name, array)` in the order of `plan`.
    max_shard_bytes: largest shard; a larger tensor gets one of its own.

  Raises:
    ValueError: the tensors are not those of the plan.
  """
  shards = _shards(plan, max_shard_bytes)
  count = len(shards)
  names = [f"{stem}.safetensors"] if count == 1 else [
    f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
  ]  # fmt: skip
  weight_map = {t[0]: n for n, shard in zip(names, shards) for t in shard}
  paths = [os.path.join(folder, name) for name in names]
  total = plan_bytes(plan)
  progress = Progress(f"writing {folder}", total)
  remaining = iter(tensors)
  try:
    for path, shard in zip(paths, shards):
      _write_shard(f"{path}.tmp", shard, remaining, progress)
    if next(remaining, None) is not None:
      raise ValueError("there are more tensors than planned")
  except BaseException:
    for path in paths:
      with contextlib.suppress(FileNotFoundError):
        os.remove(f"{path}.tmp")
    raise
  for path in paths:
    os.replace(f"{path}.tmp", path)
  if count > 1:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path = os.path.join(folder, f"{stem}.safetensors.index.json")
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
      json.dump(index, file, indent=2, sort_keys=True)
    os.replace(f"{path}.tmp", path)


def _write_shard(path: str, shard, tensors, progress: Progress) -> None:
  header, starts = _layout(shard)
  with open(path, "wb") as file:
    file.write(header)
    for name, shape, dtype in shard:
      got, array = next(tensors, (None, None))
      if got != name or array.shape != tuple(shape) or array.dtype != dtype:
        raise ValueError(f"planned {name} {shape} {dtype}, got {got}")
      file.seek(starts[name])
      for block in _row_blocks(array):
        file.write(contiguous(block).reshape(-1).view(np.uint8))
        progress.add(block.nbytes)


def _row_blocks(array: np.ndarray):
  """Slices of the first axis, so that no second whole copy exists."""
  if array.ndim == 0 or array.size == 0:
    return [array]
  rows = max(1, _WRITE_BYTES // (array.nbytes // len(array)))
  return [array[i : i + rows] for i in range(0, len(array), rows)]
