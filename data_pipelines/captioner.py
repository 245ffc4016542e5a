# SPDX-License-Identifier: Apache-2.0
"""Captions the records of a stage or of a dataset with a vision-language model.

    python -m data_pipelines.captioner --input=data/stage1 \\
      --url=http://localhost:8000/v1 --model=Qwen/Qwen3-VL-8B-Instruct \\
      --kinds=general,text,knowledge,structured,edit \\
      --languages=en:0.7,zh:0.3 --lengths=short:0.2,medium:0.5,long:0.3

Any server of the OpenAI protocol does (vLLM, SGLang, llama.cpp, a hosted
one); several of the same model may be given, separated by commas. Of a stage
the records are captioned that *decide* kept, or all where it has not run.
Captions go to OUT (default: INPUT/caption) as one Parquet file per shard,
answers to OUT/cache. The same command resumes a run that was killed.

A router picks the kinds that suit a record; languages and lengths are drawn
by weight from a hash of its id. An answer that fails the checks is asked for
again, then recorded with its reason; --retry=REASON, or 'all', asks again for
just those. `config.captions` of a stage mixes the captions when it is
materialised; see docs/captions.md.
"""

import collections
import os
import pathlib
import sys

import pyarrow.parquet as pq
from absl import app, flags

from data_pipelines.caption import inputs, job, mix, record
from data_pipelines.caption.endpoint import Client, Endpoint
from data_pipelines.caption.kinds import (
  KINDS,
  LANGUAGES,
  LENGTHS,
  parse_weights,
)
from data_pipelines.cli import clean_exit, exclusive
from data_pipelines.engine import fingerprints, shards
from data_pipelines.errors import InputError
from data_pipelines.reasons import matches, tally
from data_pipelines.sources.datasets import is_stage
from data_pipelines.sources.items import digest


def caption(
  path: pathlib.Path,
  out: pathlib.Path,
  settings: record.Settings,
  ask: record.Ask,
  retry: str | None = None,
) -> dict[str, int]:
  """Captions every shard that is not done.

  Args:
    path: a stage or a dataset.
    out: folder of the captions.
    settings: what to ask for.
    ask: the captioner.
    retry: a reason, or 'all': rows that failed for it are asked for again.

  Returns:
    Rows of all shards that are 'valid', 'failed' and 'unrouted'.

  Raises:
    InputError: anything that the user can fix. Shards with too many failed
      rows are named when all others are done.
  """
  sources = inputs.find(path)
  counts: collections.Counter = collections.Counter()
  refused = []
  with exclusive(out):
    shards.clean(out, {source.stem for source in sources})
    for source in sources:
      fingerprint = fingerprint_of(source, settings)
      done = shards.is_done(out, source.stem, fingerprint)
      if done and not (retry and _has_reason(out, source.stem, retry)):
        counts.update(shards.read_marker(out, source.stem)["counts"])
        continue
      try:
        counts.update(
          job.run(
            source.path, source.wanted, out, source.stem, fingerprint,
            settings, ask, retry,
          )
        )  # fmt: skip
      except job.TooManyFailedError as error:
        refused.append(str(error))
  if refused:
    more = f" ({len(refused)} shards are refused)" if len(refused) > 1 else ""
    raise InputError(refused[0] + more)
  return {n: counts[n] for n in ("valid", "failed", "unrouted")}


def fingerprint_of(source: inputs.Source, settings: record.Settings) -> str:
  """What the captions of a shard depend on; not how they were asked for."""
  return digest(
    fingerprints.code(job.CODE), source.identity, settings.model,
    settings.kinds, dict(settings.languages), dict(settings.lengths),
    settings.per_kind, settings.tries, settings.classify, settings.seed,
    settings.max_side, settings.limits.pixels,
  )  # fmt: skip


def _has_reason(out: pathlib.Path, stem: str, reason: str) -> bool:
  table = pq.read_table(out / f"{stem}.parquet", columns=["reason"])
  return any(matches(r, reason) for r in table["reason"].to_pylist())


def reasons(out: pathlib.Path) -> collections.Counter:
  """How often each category of reason occurs in a folder of captions."""
  found: collections.Counter = collections.Counter()
  for path in sorted(out.glob("part-*.parquet")):
    rows = pq.read_table(path, columns=["reason"])["reason"].to_pylist()
    found.update(tally(filter(None, rows)))
  return found


def _define_flags() -> None:
  flags.DEFINE_string("input", None, "A stage or a dataset.")
  flags.DEFINE_string("out", None, "Folder; default: INPUT/caption.")
  flags.DEFINE_list("url", None, "Servers of one model, up to /v1.")
  flags.DEFINE_string("model", None, "The model, as its server calls it.")
  flags.DEFINE_string("key_variable", "", "Environment variable of the key.")
  flags.DEFINE_list("kinds", list(KINDS), "Kinds that may be asked for.")
  flags.DEFINE_list("languages", ["en"], "Languages, with weights: en:0.7.")
  flags.DEFINE_list(
    "lengths", list(LENGTHS), "Lengths, with weights: short:0.2."
  )
  flags.DEFINE_integer("per_kind", 1, "Captions of a kind.", lower_bound=1)
  flags.DEFINE_bool("classify", False, "Let the model name the category.")
  flags.DEFINE_string("retry", None, "Reason to try again, or 'all'.")
  flags.DEFINE_string("cache", None, "Folder of answers; default: OUT/cache.")
  # The defaults below are ours.
  flags.DEFINE_integer("tries", 2, "Answers to read per caption.", 1)
  flags.DEFINE_integer("concurrency", 16, "Requests at a time.", 1)
  flags.DEFINE_float("timeout", 120.0, "Seconds of a request.", 0.1)
  flags.DEFINE_integer("attempts", 4, "Requests for an answer.", 1)
  flags.DEFINE_integer("max_tokens", 2048, "Of an answer.", 1)
  flags.DEFINE_integer("max_side", 1536, "Pixels that are sent.", 16)
  flags.DEFINE_float(
    "max_error_rate", 0.5, "Share of failed captions that refuses a shard."
  )
  flags.DEFINE_integer("processes", 0, "That decode; 0: one per core.", 0)
  flags.DEFINE_integer("seed", 0, "Of the draws.")
  flags.mark_flags_as_required(["input", "url", "model"])


def _settings(values) -> record.Settings:
  names = (
    "model", "per_kind", "tries", "classify", "seed", "max_side",
    "max_error_rate", "concurrency", "processes",
  )  # fmt: skip
  return record.Settings(
    kinds=tuple(parse_weights(values.kinds, KINDS, "kinds")),
    languages=parse_weights(values.languages, tuple(LANGUAGES), "languages"),
    lengths=parse_weights(values.lengths, LENGTHS, "lengths"),
    **{name: getattr(values, name) for name in names},
  )


def _out(values) -> pathlib.Path:
  """Where captions go.

  Raises:
    InputError: beside a dataset they need a name, for its folder is finished.
  """
  path = pathlib.Path(values.input)
  if values.out:
    return pathlib.Path(values.out)
  if not is_stage(path):
    raise InputError(f"Captions of the dataset {path} need --out=FOLDER.")
  return path / mix.FOLDER


def main(argv: list[str]) -> None:
  """Captions, then says how many captions can be used and why others not."""
  del argv
  values = flags.FLAGS
  with clean_exit():
    out = _out(values)
    cache = values.cache if values.cache is not None else str(out / "cache")
    settings = _settings(values)
    client = Client(
      Endpoint(
        urls=tuple(values.url), model=values.model,
        key_variable=values.key_variable, timeout=values.timeout,
        attempts=values.attempts, max_tokens=values.max_tokens, cache=cache,
      )
    )  # fmt: skip
    try:
      counts = caption(
        pathlib.Path(values.input), out, settings, client, values.retry
      )
    except KeyboardInterrupt:
      print(
        "Interrupted; the same command goes on, and answers so far are kept.",
        file=sys.stderr,
      )
      sys.exit(130)
  why = ", ".join(f"{n} {what}" for what, n in reasons(out).most_common())
  print(
    f"{os.fspath(out)}: {counts['valid']} captions, {counts['failed']} failed, "
    f"{counts['unrouted']} records that no kind suits ({why or 'none lost'}); "
    f"{client.asked} answers asked for, {client.cached} from the cache"
  )


if __name__ == "__main__":
  _define_flags()
  app.run(main)
