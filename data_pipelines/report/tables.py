# SPDX-License-Identifier: Apache-2.0
"""Tables in HTML."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table; cells are HTML already.

  Args:
    head: titles of the columns.
    rows: as many cells each.
  """
  top = "".join(f"<th>{title}</th>" for title in head)
  body = "".join(
    f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows
  )
  return f"<table><tr>{top}</tr>{body}</table>"
