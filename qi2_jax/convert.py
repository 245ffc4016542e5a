# SPDX-License-Identifier: Apache-2.0
"""Converts pipeline folders and LoRA adapters from and to diffusers.

    python -m qi2_jax.convert import --from=Qwen-Image-2.1 --to=models/qi21
    python -m qi2_jax.convert export --from=models/qi21 --to=for_diffusers
    python -m qi2_jax.convert import --from=adapter.safetensors \\
      --to=models/lora --base=models/qi21
    python -m qi2_jax.convert export --from=models/lora --to=out.safetensors
    python -m qi2_jax.convert export --from=runs/lora --to=out.safetensors
    python -m qi2_jax.convert verify Qwen-Image-2.1

Transformer and VAE are rewritten: safetensors on import become Orbax arrays
and the reverse. Text encoder, processor, scheduler and all other files are
copied as they are. Nothing is under the name --to before it is complete.
Conversion runs on the host; import needs memory for the transformer once,
export for a layer. `verify` compares one folder with diffusers.
"""

import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator

import jax
from absl import flags, logging

from qi2_jax import cli
from qi2_jax.errors import InputError
from qi2_jax.interop import (
  encoder_folder,
  lora,
  mmdit,
  model_folder,
  scheduler,
)
from qi2_jax.interop.published import read_json, write_json
from qi2_jax.interop.safetensors_io import Progress
from qi2_jax.training import build, workdir

WORDS = ("import", "export", "verify")
# What the conversion writes anew; every other file is copied.
_REWRITTEN = re.compile(
  r"(transformer|vae)/(config\.json|variables/.*"
  r"|[^/]*\.(safetensors|bin)(\.index\.json)?)"
)
_COPY_BYTES = 16 * 2**20


def _define_flags():
  flags.DEFINE_string("from", None, "Folder (or adapter) to read.")
  flags.DEFINE_string("to", None, "New folder (or adapter) to write.")
  flags.DEFINE_string(
    "base", None, "Model folder that an imported LoRA adapter belongs to."
  )
  flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"],
    "Export: dtype of transformer and VAE, kept by default. Verify: of both "
    "sides, float32 by default.",
  )  # fmt: skip


def import_pipeline(source: str, target: str) -> None:
  """Makes a native pipeline folder of a diffusers one.

  Raises:
    InputError: `source` is no supported pipeline, `target` exists, or the
      disk is too small.
  """
  size = _check(source, target)
  with _complete(target) as folder:
    config, params = model_folder.load_mmdit(source)
    model_folder.save_mmdit(os.path.join(folder, "transformer"), config, params)
    del params
    logging.info("imported the transformer")
    config, variables = model_folder.load_vae(source)
    model_folder.save_vae(os.path.join(folder, "vae"), config, variables)
    logging.info("imported the VAE")
    _copy(_rest(source), folder)
  logging.info("wrote %s (%.2f GB)", target, size / 1e9)


def export_pipeline(source: str, target: str, dtype: str | None = None) -> None:
  """Makes a diffusers pipeline folder of a native one.

  Args:
    source: pipeline folder.
    target: new folder.
    dtype: of transformer and VAE; None keeps theirs.

  Raises:
    InputError: as `import_pipeline`, or diffusers has no such variant.
  """
  size = _check(source, target)
  with _complete(target) as folder:
    config, params = model_folder.open_mmdit(source)
    model_folder.export_mmdit(
      os.path.join(folder, "transformer"), config, params, dtype=dtype
    )
    del params
    config, variables = model_folder.open_vae(source)
    model_folder.export_vae(
      os.path.join(folder, "vae"), config, variables, dtype=dtype
    )
    _copy(_rest(source), folder)
  logging.info("wrote %s (%.2f GB)", target, size / 1e9)


def _check(source: str, target: str) -> int:
  """Everything that can be known before the long part; bytes to write."""
  _check_target(source, target)
  model_folder.check_pipeline_folder(source)
  scheduler.shift_config(
    read_json(os.path.join(source, "scheduler", "scheduler_config.json"))
  )
  scheduler.sample_sigmas(read_json(os.path.join(source, "model_index.json")))
  size = model_folder.check_weights(source)
  size += sum(os.path.getsize(path) for path, _ in _rest(source))
  free = shutil.disk_usage(os.path.dirname(os.path.abspath(target))).free
  if free < size:
    raise InputError(
      f"{target} needs {size / 1e9:.2f} GB and its disk has "
      f"{free / 1e9:.2f} GB free; free some space or choose another disk."
    )
  return size


def _check_target(source: str, target: str) -> None:
  if os.path.exists(target):
    raise InputError(f"{target} exists; choose a new name for --to.")
  parent = os.path.dirname(os.path.abspath(target))
  if not os.path.isdir(parent):
    raise InputError(f"the folder of --to, {parent}, does not exist.")
  inside = os.path.commonpath([os.path.realpath(source),
                               os.path.realpath(target)])  # fmt: skip
  if inside == os.path.realpath(source):
    raise InputError(
      f"{target} is inside {source}; choose a place outside for --to."
    )


@contextlib.contextmanager
def _complete(target: str) -> Iterator[str]:
  """A temporary folder that becomes `target` when the block succeeds."""
  temporary = f"{os.path.abspath(target)}.tmp-{os.getpid()}"
  shutil.rmtree(temporary, ignore_errors=True)
  os.makedirs(temporary)
  try:
    yield temporary
    os.rename(temporary, target)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _files(folder: str) -> list[tuple[str, str]]:
  """`(path, relative path)` of all files below a folder.

  Hidden folders (.git, a downloader's .cache) are no part of the model.
  Links are followed: a download may be a folder of links.
  """
  out = []
  for place, names, files in os.walk(folder, followlinks=True):
    names[:] = sorted(n for n in names if not n.startswith("."))
    for name in sorted(files):
      path = os.path.join(place, name)
      out.append((path, os.path.relpath(path, folder).replace(os.sep, "/")))
  return out


def _rest(source: str) -> list[tuple[str, str]]:
  """The files of a pipeline folder that are copied."""
  return [f for f in _files(source) if not _REWRITTEN.fullmatch(f[1])]


def _copy(files: list[tuple[str, str]], target: str) -> None:
  progress = Progress(
    "copying the other files", sum(os.path.getsize(p) for p, _ in files)
  )
  for path, relative in files:
    copy = os.path.join(target, relative)
    os.makedirs(os.path.dirname(copy), exist_ok=True)
    with open(path, "rb") as read, open(copy, "wb") as write:
      while block := read.read(_COPY_BYTES):
        write.write(block)
        progress.add(len(block))


def export_workdir(source: str, target: str, dtype: str | None = None) -> None:
  """Makes a diffusers pipeline folder of a flow-matching workdir.

  MMDiT (EMA; a LoRA run's factors are merged into its base) and VAE are the
  run's. The text encoder is the one it was trained with, copied from
  `config.text.path`, or the built-in one.

  Args:
    source: workdir.
    target: new folder.
    dtype: of transformer and VAE; None keeps theirs.

  Raises:
    InputError: `target` exists, or diffusers has no such variant.
  """
  _check_target(source, target)
  run = workdir.load(source)
  mmdit.published(run.model.config)  # known before the first file is written
  sampling = build.sampling_config(run.config)
  with _complete(target) as folder:
    model_folder.export_mmdit(
      os.path.join(folder, "transformer"), run.model.config, run.params,
      dtype=dtype,
    )  # fmt: skip
    model_folder.export_vae(
      os.path.join(folder, "vae"), run.conditioner.vae.config, run.frozen.vae,
      dtype=dtype,
    )  # fmt: skip
    os.mkdir(os.path.join(folder, "scheduler"))
    write_json(
      os.path.join(folder, "scheduler", "scheduler_config.json"),
      scheduler.published(sampling.shift),
    )
    write_json(
      os.path.join(folder, "model_index.json"),
      scheduler.published_index(sampling.sigmas),
    )
    if run.config.text.path:
      _copy(_encoder_files(run.config.text.path), folder)
    else:
      encoder_folder.export(folder, run.conditioner.encoder, run.frozen.encoder)
  logging.info(
    "wrote %s (step %d; text encoder: %s; guidance %g and %d steps in "
    "training previews)", target, run.step,
    run.conditioner.encoder.description, sampling.guidance, sampling.steps,
  )  # fmt: skip


def _encoder_files(path: str) -> list[tuple[str, str]]:
  """What a pipeline folder needs of the folder of an encoder."""
  weights = model_folder.component(path, "text_encoder")
  processor = encoder_folder.processor_folder(path, weights)
  out = [(p, f"text_encoder/{name}") for p, name in _files(weights)]
  # Weights may lie beside the tokenizer.
  return out + [
    (p, f"processor/{name}")
    for p, name in _files(processor)
    if ".safetensors" not in name
  ]


def import_lora(source: str, target: str, base: str | None) -> None:
  """Makes a native LoRA folder of a PEFT or diffusers adapter.

  Raises:
    InputError: no base model, or an adapter of another model.
  """
  if base is None:
    raise InputError(
      f"{source} is a LoRA adapter; pass --base=MODEL, the folder of the "
      "model it belongs to."
    )
  config = model_folder.mmdit_config(base)
  adapter = lora.read(source, model_folder.abstract_mmdit(config))
  lora.save(target, adapter)
  logging.info("wrote the LoRA adapter %s", target)


def export_model(source: str, target: str, dtype: str | None = None) -> None:
  """Exports a pipeline folder, a workdir or an adapter, whichever it is.

  A workdir becomes a pipeline folder, or under a name in .safetensors the
  adapter that it trained.

  Args:
    source: what to export.
    target: new folder or file.
    dtype: of transformer and VAE; adapters keep theirs.

  Raises:
    InputError: as `export_pipeline`, or the workdir trained no adapter.
  """
  if lora.is_native(source):
    _check_target(source, target)
    lora.write(target, lora.load(source))
  elif not workdir.is_workdir(source):
    export_pipeline(source, target, dtype)
  elif target.endswith(".safetensors"):
    _check_target(source, target)
    lora.write(target, workdir.load_adapter(source))
    logging.info("wrote the LoRA adapter %s", target)
  else:
    export_workdir(source, target, dtype)


def main(words: list[str]) -> int | None:
  """Entry point.

  Args:
    words: `["import"]`, `["export"]` or `["verify", folder]`.
  """
  if words[:1] == ["verify"]:
    if len(words) != 2:
      raise InputError("verify needs one folder: convert verify DIR.")
    from qi2_jax import verify

    return verify.verify(words[1], flags.FLAGS)
  if words not in (["import"], ["export"]):
    raise InputError(
      f"give one of the words {', '.join(WORDS)} (got "
      f"{' '.join(words) or 'none'}); see --help."
    )
  # An accelerator would only be a detour from disk to disk.
  jax.config.update("jax_platforms", "cpu")
  values = flags.FLAGS
  source, target = values["from"].value, values.to
  if source is None or target is None:
    raise InputError(f"{words[0]} needs --from and --to; see --help.")
  if not os.path.exists(source):
    raise InputError(f"{source} does not exist; see --from.")
  if words[0] == "export" and values.base is not None:
    raise InputError("--base is for importing a LoRA adapter only.")
  if words[0] == "import" and values.dtype is not None:
    raise InputError("--dtype is for export only; import keeps all dtypes.")
  start = time.monotonic()
  _convert(words[0], source, target)
  logging.info("done in %.0f s", time.monotonic() - start)
  return 0


def _convert(word: str, source: str, target: str) -> None:
  values = flags.FLAGS
  if word == "import" and lora.is_adapter(source):
    _check_target(source, target)
    import_lora(source, target, values.base)
  elif word == "import":
    import_pipeline(source, target)
  else:
    export_model(source, target, values.dtype)


def _define_verify_flags():
  # Imported only for its own word: it needs more of the program than a
  # conversion does.
  from qi2_jax import verify

  verify._define_flags()
  flags.adopt_module_key_flags(verify)


if __name__ == "__main__":
  _define_flags()
  if "verify" in sys.argv[1:]:
    _define_verify_flags()
  cli.run_words(main)
