# SPDX-License-Identifier: Apache-2.0
"""Streaming safetensors against the safetensors library."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from raw_bits import bits

from qi2_jax.errors import InputError
from qi2_jax.interop.safetensors_io import (
  contiguous,
  open_tensors,
  write_tensors,
)

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"


def tensors():
  """All the shapes and types that trip writers."""
  rng = np.random.default_rng(0)
  wide = rng.normal(size=(5, 300)).astype(np.float32)
  return {
    "odd.bf16": rng.normal(size=3).astype(ml_dtypes.bfloat16),
    "transposed": wide.T,
    "wide.bf16": wide.astype(ml_dtypes.bfloat16),
    "half": wide.astype(np.float16),
    "double": wide[:1].astype(np.float64),
    "four": rng.normal(size=(2, 3, 4, 5)).transpose(3, 1, 0, 2),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "count": np.arange(7, dtype=np.int64),
    "flag": np.array([True, False]),
  }


def plan_of(items):
  return [(n, t.shape, t.dtype) for n, t in items.items()]


def write(folder, items, **options):
  write_tensors(
    str(folder), STEM, plan_of(items), iter(items.items()), **options
  )


def library(folder):
  """Everything the safetensors library finds in a folder."""
  out = {}
  for path in sorted(folder.glob("*.safetensors")):
    out.update(safetensors.numpy.load_file(path))
  return out


@pytest.mark.parametrize("limit", [10**9, 7000, 1])
def test_the_library_reads_what_is_written(limit, tmp_path):
  items = tensors()
  write(tmp_path, items, max_shard_bytes=limit)
  found = library(tmp_path)
  assert found.keys() == items.keys()
  for name, value in items.items():
    assert found[name].dtype == value.dtype
    np.testing.assert_array_equal(bits(found[name]), bits(value.copy()))
  files = sorted(p.name for p in tmp_path.iterdir())
  if limit == 10**9:
    assert files == [f"{STEM}.safetensors"]
    return
  count = len(files) - 1
  assert count == (len(items) if limit == 1 else count) and count > 1
  names = [
    f"{STEM}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
  ]
  assert files == sorted([*names, INDEX])
  index = json.loads((tmp_path / INDEX).read_text())
  total = sum(t.nbytes for t in items.values())
  assert index["metadata"]["total_size"] == total
  for name, file in index["weight_map"].items():
    assert name in safetensors.numpy.load_file(tmp_path / file)


def test_torch_reads_every_alignment(tmp_path):
  torch = pytest.importorskip("torch")
  from safetensors.torch import load_file

  items = {k: v for k, v in tensors().items() if k != "empty"}
  write(tmp_path, items)
  path = tmp_path / f"{STEM}.safetensors"
  found = load_file(path)
  assert found["odd.bf16"].dtype == torch.bfloat16
  np.testing.assert_array_equal(found["double"].numpy(), items["double"])
  with safetensors.safe_open(path, "pt") as file:
    assert file.metadata() == {"format": "pt"}
  # Types wider than the bytes before them would start at odd addresses.
  raw = path.read_bytes()
  length = int.from_bytes(raw[:8], "little")
  header = json.loads(raw[8 : 8 + length])
  assert length % 8 == 0
  for name, value in items.items():
    assert header[name]["data_offsets"][0] % value.itemsize == 0


def test_reads_what_the_library_wrote(tmp_path):
  items = {k: np.ascontiguousarray(v) for k, v in tensors().items()}
  items["scalar"] = np.array(2.5, np.float32)
  safetensors.numpy.save_file(items, tmp_path / f"{STEM}.safetensors")
  reader = open_tensors(str(tmp_path), STEM)
  assert set(reader.names) == items.keys()
  for name, value in items.items():
    assert reader.shape(name) == value.shape
    assert reader.dtype(name) == value.dtype
    np.testing.assert_array_equal(bits(reader.read(name)), bits(value))
  index = (slice(1, 3), slice(None), 0)
  np.testing.assert_array_equal(
    reader.slice("four", index), items["four"][index]
  )


def test_opening_reads_no_data(tmp_path):
  """A sparse file stands for 4 TB of weights."""
  shape = [2**20, 2**20]
  header = json.dumps(
    {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 2**42]}}
  ).encode()
  path = tmp_path / f"{STEM}.safetensors"
  with open(path, "wb") as file:
    file.write(len(header).to_bytes(8, "little") + header)
    try:
      file.truncate(8 + len(header) + 2**42)
    except OSError:
      pytest.skip("the file system has no sparse files of this size")
  reader = open_tensors(str(tmp_path), STEM)
  assert reader.shape("w") == tuple(shape)
  part = reader.slice("w", (slice(10**6, 10**6 + 2), slice(5, 8)))
  np.testing.assert_array_equal(part, np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_contiguous_is_a_copy(axes):
  source = np.arange(2 * 3 * 700).reshape(2, 3, 700).transpose(axes)
  out = contiguous(source)
  assert out.flags.c_contiguous and not np.shares_memory(out, source)
  np.testing.assert_array_equal(out, source)


def sharded(folder):
  items = {f"w{i}": np.full((4, 4), i, np.float32) for i in range(4)}
  write(folder, items, max_shard_bytes=100)
  return sorted(folder.glob("*.safetensors"))


def broken(kind, folder):
  """Breaks a good folder in one way."""
  first, second = sharded(folder)[:2]
  raw = first.read_bytes()
  if kind == "no weights":
    for path in folder.iterdir():
      path.unlink()
  elif kind == "missing shard":
    second.unlink()
  elif kind == "cut data":
    first.write_bytes(raw[:-3])
  elif kind == "cut header":
    first.write_bytes(raw[:40])
  elif kind == "empty file":
    first.write_bytes(b"")
  elif kind == "extra bytes":
    first.write_bytes(raw + b"\0")
  elif kind == "wrong shape":
    first.write_bytes(raw.replace(b"[4,4]", b"[4,5]"))
  elif kind == "unknown type":
    first.write_bytes(raw.replace(b'"F32"', b'"X99"'))
  elif kind == "garbage header":
    first.write_bytes(raw[:8] + b"!" * (len(raw) - 8))
  elif kind == "twice":
    second.write_bytes(raw)
  elif kind == "twice in a header":
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    header += header[1:-1] + b"}"
    first.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
  elif kind == "other content":
    first.write_bytes(raw.replace(b'"w0"', b'"v0"'))
  elif kind == "bad index":
    (folder / INDEX).write_text("{}")


@pytest.mark.parametrize(
  "kind, message",
  [
    ("no weights", f"has neither {STEM}.safetensors nor its index"),
    ("missing shard", "names .*00002-of-00004.*, which is missing"),
    ("cut data", "00001-of-00004.* truncated or corrupt.* promises"),
    ("cut header", "00001-of-00004.* truncated inside its header"),
    ("empty file", "truncated inside its header"),
    ("extra bytes", "truncated or corrupt"),
    ("wrong shape", "corrupt: w0 of shape"),
    ("unknown type", "stores w0 as X99"),
    ("garbage header", "is no safetensors file"),
    ("twice", "tensor w0 is in .*00001.* and in .*00002"),
    ("twice in a header", "names a twice"),
    ("other content", "promises tensor w0 in .*00001"),
    ("bad index", "is no safetensors index"),
  ],
)
def test_damage_is_one_sentence(kind, message, tmp_path):
  broken(kind, tmp_path)
  with pytest.raises(InputError, match=message) as error:
    open_tensors(str(tmp_path), STEM)
  assert "\n" not in str(error.value)


def test_a_failed_write_leaves_nothing(tmp_path):
  items = {f"w{i}": np.zeros((4, 4), np.float32) for i in range(3)}
  plan = plan_of(items)

  def interrupted():
    yield "w0", items["w0"]
    yield "w1", items["w1"]
    assert len(os.listdir(tmp_path)) == 3
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write_tensors(str(tmp_path), STEM, plan, interrupted(), 100)
  assert os.listdir(tmp_path) == []
  for given in ({"w0": items["w0"]}, {**items, "w4": items["w0"]},
                {**items, "w2": np.zeros((4, 4))}):  # fmt: skip
    with pytest.raises(ValueError, match="planned"):
      write_tensors(str(tmp_path), STEM, plan, iter(given.items()))
    assert os.listdir(tmp_path) == []
