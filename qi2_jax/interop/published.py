# SPDX-License-Identifier: Apache-2.0
"""Reading published JSON configs and refusing what no code path implements."""

import json
from collections.abc import Collection, Mapping

from qi2_jax.errors import InputError


def read_json(path: str) -> dict:
  """Reads a JSON object.

  Raises:
    InputError: the file is missing or holds something else.
  """
  try:
    with open(path, encoding="utf-8") as file:
      out = json.load(file)
  except FileNotFoundError:
    raise InputError(
      f"{path} does not exist; pass a complete model folder."
    ) from None
  except ValueError:
    out = None
  if not isinstance(out, dict):
    raise InputError(f"{path} holds no JSON object; download it again.")
  return out


def write_json(path: str, fields: Mapping) -> None:
  """Writes a JSON object the way the public folders have it."""
  with open(path, "w", encoding="utf-8") as file:
    json.dump(fields, file, indent=2, ensure_ascii=False)
    file.write("\n")


def check_class(published: Mapping, name: str) -> None:
  """Raises InputError unless the config is of class `name`."""
  found = published.get("_class_name")
  if found != name:
    raise InputError(
      f"config.json is of class {found}, not {name}; pass a Qwen-Image-2.x "
      "model folder."
    )


def check_value(published: Mapping, name: str, allowed: Collection) -> None:
  """Raises InputError unless the field is absent or one of `allowed`."""
  value = published.get(name, next(iter(allowed)))
  # True == 1 in Python, but a config that mixes them up is not ours.
  if not any(value == a and type(value) is type(a) for a in allowed):
    wanted = " or ".join(json.dumps(a) for a in allowed)
    raise InputError(
      f"config.json has {name}={json.dumps(value)}, which is not supported; "
      f"only {wanted} is."
    )


def check_known(published: Mapping, known: Collection[str]) -> None:
  """Raises InputError for a switched-on field that this code ignores."""
  for name, value in published.items():
    if name in known or name.startswith("_") or name == "qi2_jax":
      continue
    if value not in (None, False, [], {}):
      raise InputError(
        f"config.json has the unknown field {name}={json.dumps(value)}, "
        "which may change the model; only the fields of the public "
        "Qwen-Image-2.x configs are supported."
      )


def integers(published: Mapping, names: Mapping[str, str]) -> dict:
  """`{ours: value}` of the positive whole numbers that are present.

  Args:
    published: the config.
    names: published field -> our field.

  Raises:
    InputError: a value is no positive integer (or list of them).
  """
  out = {}
  for theirs, ours in names.items():
    if theirs not in published:
      continue
    value = published[theirs]
    several = isinstance(value, (list, tuple))
    numbers = value if several else [value]
    if not all(type(v) is int and v > 0 for v in numbers):
      raise InputError(
        f"config.json has {theirs}={json.dumps(value)} but needs positive "
        "whole numbers; download it again."
      )
    out[ours] = tuple(value) if several else value
  return out


def extras(published: Mapping, allowed: Collection[str]) -> dict:
  """Our own fields, which native folders keep under the key `qi2_jax`.

  Raises:
    InputError: a field of a newer or older version.
  """
  out = dict(published.get("qi2_jax") or {})
  for name in out:
    if name not in allowed:
      raise InputError(
        f"config.json has the unknown field qi2_jax.{name}; it was written "
        "by another version of this program."
      )
  return out
