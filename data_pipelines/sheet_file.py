# SPDX-License-Identifier: Apache-2.0
"""Writes a contact sheet: a PNG that is whole or absent."""

import os
import pathlib

from PIL import Image

from data_pipelines.errors import InputError


def save(page: Image.Image, path: str | os.PathLike) -> None:
  """Writes a page in one rename.

  Raises:
    InputError: it cannot be written.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
  try:
    page.save(temporary, format="PNG", optimize=True)
    os.replace(temporary, path)
  except OSError as error:
    raise InputError(
      f"Contact sheet {path} cannot be written ({error.strerror}); choose "
      "another path."
    ) from error
  finally:
    temporary.unlink(missing_ok=True)
