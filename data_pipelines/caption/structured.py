# SPDX-License-Identifier: Apache-2.0
"""Structured captions: JSON with entities, attributes and relations.

Checked by hand: that relations refer to entities which exist is beyond JSON
Schema, and the rest is a few lines.
"""

import json
from typing import Any

# A mapping of entities, attributes and relations that no diagram needs; ours.
_MOST = 400


class SchemaError(ValueError):
  """What is wrong with a structured caption."""


def read(answer: str) -> dict[str, Any]:
  """The structured caption in an answer, checked.

  Args:
    answer: JSON, with or without words around it.

  Returns:
    `type`, `summary`, `entities` and `relations`; keys that the schema does
    not know are left out.

  Raises:
    SchemaError: there is none, or it breaks the schema.
  """
  start, stop = answer.find("{"), answer.rfind("}")
  if start < 0 or stop < start:
    raise SchemaError("no object")
  try:
    value = json.loads(answer[start : stop + 1])
  except (ValueError, RecursionError) as error:
    raise SchemaError(str(error).partition(":")[0] or "too deep") from error
  found = {name: _string(value, name, "it") for name in ("type", "summary")}
  entities = [_entity(e) for e in _list(value, "entities")]
  if not entities:
    raise SchemaError("no entities")
  ids = [entity["id"] for entity in entities]
  if len(set(ids)) < len(ids):
    raise SchemaError("two entities have one id")
  relations = [_relation(r, set(ids)) for r in _list(value, "relations")]
  if len(entities) + len(relations) > _MOST:
    raise SchemaError(f"over {_MOST} entities and relations")
  return {**found, "entities": entities, "relations": relations}


def write(caption: dict[str, Any]) -> str:
  """The text of a structured caption."""
  return json.dumps(caption, ensure_ascii=False, separators=(", ", ": "))


def _list(value: Any, name: str) -> list[Any]:
  found = value.get(name)
  if not isinstance(found, list):
    raise SchemaError(f"{name} is no list")
  return found


def _string(value: Any, name: str, where: str) -> str:
  if not isinstance(value, dict):
    raise SchemaError(f"{where} is no object")
  found = value.get(name)
  # Models number entities as they like.
  if isinstance(found, int) and not isinstance(found, bool):
    found = str(found)
  if not isinstance(found, str) or not found.strip():
    raise SchemaError(f"{where} has no {name}")
  return found.strip()


def _entity(value: Any) -> dict[str, Any]:
  entity: dict[str, Any] = {
    name: _string(value, name, "an entity") for name in ("id", "name")
  }
  attributes = value.get("attributes", {})
  if not isinstance(attributes, dict):
    raise SchemaError("attributes are no object")
  entity["attributes"] = {
    name: item if isinstance(item, str) else json.dumps(item)
    for name, item in attributes.items()
    if item is not None and item != "" and item != []
  }
  return entity


def _relation(value: Any, ids: set[str]) -> dict[str, str]:
  relation = {
    name: _string(value, name, "a relation")
    for name in ("subject", "predicate", "object")
  }
  for name in ("subject", "object"):
    if relation[name] not in ids:
      raise SchemaError(f"a relation has an unknown {name}")
  return relation
