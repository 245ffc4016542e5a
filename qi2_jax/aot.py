# SPDX-License-Identifier: Apache-2.0
"""Compiles the training step of a config for a TPU pod, without a TPU.

    pip install -e '.[aot]'
    python -m qi2_jax.aot --config=experiments/pretrain.py:512 \\
      --topology=v5p:4x4x4 --batch_per_chip=8 --json=plan.json

It compiles the step that `python -m qi2_jax.train` runs and prints HBM per
chip against the limit, FLOPs, collectives and a roofline; of Flow-GRPO the
rollout as well, a program of its own. `--batch_per_chip` keeps the global
batch and sets `config.optimizer.accumulate` so that each microbatch has so
many samples per chip (of Flow-GRPO: images). The bucket is the config's
largest, with `--references` images of its size. Text states have the width
that the model's preset expects, whatever `config.text` says.

`--search` tries meshes, microbatches and remat policies and ranks those that
fit; Ctrl-C ranks what is there. The exit status is 1 when nothing fits.

By default the compiler is told not to spend time on execution speed: minutes
become seconds, the memory differs by a few percent. `--production` compiles
as training does.
"""

import copy
import importlib.metadata
import importlib.util
import os
import re
import time

import jax
from absl import flags, logging
from jax.experimental import topologies
from ml_collections import config_flags

from qi2_jax import cli
from qi2_jax.errors import InputError
from qi2_jax.evaluation import store
from qi2_jax.parallel import chips, hlo, hlo_costs
from qi2_jax.parallel import mesh as mesh_lib
from qi2_jax.training import dmd_plan, grpo_plan, program, vae_plan

_GIB = 2**30
# Meshes that a search tries; -1 takes the rest of the chips.
_SEARCH_MESHES = (
  {"fsdp": -1}, {"data": 4, "fsdp": -1}, {"fsdp": -1, "tensor": 4},
)  # fmt: skip


def topology_devices(topology: str, slices: int = 1):
  """The devices of a pod that is not there, e.g. `v5p:4x4x4`.

  Args:
    topology: of one slice.
    slices: number of them.

  Raises:
    InputError: unknown chip or shape, or libtpu is not installed.
  """
  chips.chip_of(topology)
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(
      "compiling for TPUs needs libtpu; install it with pip install -e "
      "'.[aot]' (Linux, x86-64)."
    )
  # libtpu looks for the machine it runs on unless it is told; any will do.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  # No chip is used, so nobody has to wait for one.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  try:
    return topologies.get_topology_desc(
      topology, "tpu", num_slices=slices
    ).devices
  except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
    raise InputError(
      f"topology {topology!r} is unknown to libtpu "
      f"({str(error).splitlines()[0]}); use e.g. v5p:4x4x4 or v5e:16x16."
    ) from error


def lower_fns(config) -> dict:
  """What lowers the programs of a config's objective, the step first.

  Raises:
    InputError: it is not planned here.
  """
  planned = {
    "flow_matching": {"step": program.lower_step},
    "dmd": {"step": dmd_plan.lower_step},
    "vae": {"step": vae_plan.lower_step},
    "flow_grpo": {
      "step": grpo_plan.lower_step, "rollout": grpo_plan.lower_rollout
    },
  }  # fmt: skip
  if config.objective not in planned:
    raise InputError(
      f"config.objective={config.objective!r} is not planned by this program; "
      f"it plans {sorted(planned)}."
    )
  if config.objective == "flow_matching" and config.lora.rank:
    raise InputError(
      "the step of a LoRA is not planned by this program; plan with "
      "--config.lora.rank=0, which needs more memory."
    )
  return planned[config.objective]


def with_batch_per_chip(config, batch_per_chip: float, devices: int):
  """A copy of `config` that accumulates microbatches of that size.

  Raises:
    InputError: the global batch does not divide.
  """
  config = copy.deepcopy(config)
  micro, total = round(batch_per_chip * devices), config.data.batch_size
  if config.objective == "flow_grpo":
    total = grpo_plan.images(config)
  if micro < 1 or micro != batch_per_chip * devices or total % micro:
    raise InputError(
      f"a batch of {total} does not divide into microbatches of "
      f"{batch_per_chip} per chip on {devices} chips; change --batch_per_chip "
      "or --config.data.batch_size."
    )
  config.optimizer.accumulate = total // micro
  return config


def compile_step(lowered, mesh, production: bool, name: str = "step"):
  """Compiles; returns `(compiled, None)`, or `(None, message)` out of HBM.

  Args:
    lowered: the program.
    mesh: over the devices of a topology.
    production: with all optimisations.
    name: of the program; only a step has gradients to spread.
  """
  options = program.compiler_options(mesh) if name == "step" else {}
  if not production:
    options["exec_time_optimization_effort"] = -1.0
  try:
    return lowered.compile(options), None
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return None, str(error).splitlines()[0]


def asked_gib(message: str) -> float:
  """The first size in libtpu's out-of-memory message, in GiB.

  It is what the program wants, or its temporaries alone.
  """
  value, unit = re.search(r"([\d.]+)([KMGT])\b", message).groups()
  return float(value) * 1024.0 ** ("KMGT".index(unit) - 2)


def memory_parts(compiled) -> dict[str, float]:
  """GiB per chip by part; donated outputs lie in the arguments."""
  stats = compiled.memory_analysis()
  outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
  return {
    "arguments": stats.argument_size_in_bytes / _GIB,
    "temporaries": stats.temp_size_in_bytes / _GIB,
    "outputs": outputs / _GIB,
    "code": stats.generated_code_size_in_bytes / _GIB,
  }


def plan(
  config, topology: str, devices, *, references=0, production=False
) -> dict:  # fmt: skip
  """Compiles the programs of `config` for `devices` and reports on them.

  Returns:
    The JSON of `--json`: of the step, and under their names of the other
    programs; without the compiled program's facts when it does not fit.

  Raises:
    InputError: mesh, batch or config do not suit the topology.
  """
  chip = chips.chip_of(topology)
  mesh = mesh_lib.create_mesh(config.mesh.to_dict(), devices)
  # First what may be wrong with the config, for anyone to see.
  lowered = {
    name: lower(config, mesh, references)
    for name, lower in lower_fns(config).items()
  }
  head = {
    "topology": topology,
    "chips": mesh.size,
    "slices": len({getattr(d, "slice_index", 0) for d in devices}),
    "compiler": "production" if production else "exec_time effort -1",
    "versions": {n: _version(n) for n in ("jax", "libtpu")},
    "hbm_limit_gib": chip.hbm_gib,
  }
  made = {
    name: head | _report(name, *one, chip, mesh, production)
    for name, one in lowered.items()
  }
  return made.pop("step") | made


def _report(name: str, lowered, facts, chip, mesh, production: bool) -> dict:
  """Compiles one program; what `plan` says of it."""
  start, cpu = time.perf_counter(), time.process_time()
  compiled, message = compile_step(lowered, mesh, production, name)
  report = facts | {
    "compile_seconds": time.perf_counter() - start,
    "compile_cpu_seconds": time.process_time() - cpu,
  }
  if compiled is None:
    return report | {
      "fits": False, "hbm_gib_per_chip": asked_gib(message),
      "compiler_message": message,
    }  # fmt: skip
  parts = memory_parts(compiled)
  module = hlo.parse(compiled.as_text(), facts.get("unknown_trips", 1))
  products, moved = hlo_costs.products(module), hlo_costs.collectives(module)
  # A rollout's weights are read by its products and written by none.
  state_bytes = 2 * parts["arguments"] * _GIB * (name == "step")
  if "gib_beside" in facts:
    parts["beside it"] = facts["gib_beside"]
  used = sum(parts.values())
  largest = hlo_costs.largest_buffers(module)
  buffers = [{"shape": str(b), "bytes": b.bytes} for b in largest]
  report |= {
    "fits": used <= chip.hbm_gib,
    "hbm_gib_per_chip": used,
    "hbm_parts": parts,
    "flops_per_step": products.flops * mesh.size,
    "unknown_loops": list(module.unknown_loops),
    "collectives": moved,
    "largest_buffer": buffers[0],
    "largest_buffers": buffers,
  }
  if "model_flops_per_step" not in facts:
    # A distillation's loops have lengths that are drawn at run time, and of
    # the VAE there is no analytic count: no roofline.
    return report
  return report | chips.roofline(
    chip, products.flops, facts["model_flops_per_step"] / mesh.size,
    products.bytes + state_bytes, moved,
  )  # fmt: skip


def _version(package: str) -> str:
  return importlib.metadata.version(package)


def candidates(config, devices: int):
  """Yields rows of configs: one mesh and remat policy, rising microbatches.

  The first of a row that does not fit ends it.
  """
  for spec in _SEARCH_MESHES:
    for remat in ("full", "dots", "none"):
      row, size = [], 1
      while config.data.batch_size % (size * devices) == 0 and size <= 64:
        one = with_batch_per_chip(config, size, devices)
        one.mesh.update({a: spec.get(a, 1) for a in mesh_lib.AXES})
        one.model.remat = remat
        row.append(one)
        size *= 2
      if row:
        yield row


def search(config, topology: str, devices, **options) -> list[dict]:
  """Plans every candidate; ends early on Ctrl-C.

  Returns:
    Plans that fit, fastest roofline first.

  Raises:
    InputError: the step of this objective has no roofline.
  """
  if config.objective != "flow_matching":
    raise InputError(
      f"--search ranks by the time of a roofline, which "
      f"config.objective={config.objective!r} has not; drop --search."
    )
  found = []
  try:
    for row in candidates(config, len(devices)):
      for one in row:
        made = plan(one, topology, devices, **options)
        logging.info(summary_line(made))
        if not made["fits"]:
          break
        found.append(made)
  except KeyboardInterrupt:
    logging.warning("interrupted; ranking what was compiled")
  return sorted(found, key=lambda p: p["step_seconds_roofline"])


def summary_line(p: dict) -> str:
  """One line for a search's progress and ranking."""
  mesh = ",".join(f"{k}={v}" for k, v in p["mesh"].items() if v > 1)
  head = (
    f"{mesh or 'one device'} remat={p['remat']} "
    f"batch/chip={p['batch_per_chip']:g} x {p['accumulate']}: "
    f"{p['hbm_gib_per_chip']:.1f} of {p['hbm_limit_gib']:.2f} GiB"
  )
  if not p["fits"]:
    return head + (
      ", does not fit: " + p.get("compiler_message", "over the limit")
    )
  if "mfu_roofline" not in p:
    return head
  return head + (
    f", step {p['step_seconds_roofline']:.2f} s, MFU "
    f"{100 * p['mfu_roofline']:.1f} % (bound by {p['bound_by']})"
  )


def describe(p: dict) -> str:
  """The whole plan as text, of all its programs."""
  parts = [_described(p)]
  if "rollout" in p:
    parts += ["rollout: " + _described(p["rollout"])]
  return "\n".join(parts)


def _described(p: dict) -> str:
  out = [
    f"{p['topology']}, {p['parameters'] / 1e9:.2f} B parameters, bucket "
    f"{p['bucket'][0]} x {p['bucket'][1]}, global batch {p['global_batch']}, "
    f"compiled in {p['compile_seconds']:.0f} s "
    f"({p['compile_cpu_seconds']:.0f} s of CPU)",
    summary_line(p),
  ]
  if "hbm_parts" not in p:
    return "\n".join(out)
  out += [f"  {k:<24}{v:10.2f} GiB" for k, v in p["hbm_parts"].items()]
  if "analytic_flops_per_step" in p:
    ratio = p["flops_per_step"] / p["analytic_flops_per_step"]
    out += [
      f"  {p['flops_per_step']:.4e} FLOPs per step in the program, "
      f"{ratio:.4f} of the analytic count"
    ]
  for kind, value in sorted(p["collectives"].items()):
    size = value["bytes"] / 1e9
    out += [f"  {kind:<24}{value['count']:>8} x {size:10.1f} GB in all"]
  out += [f"  largest buffer {p['largest_buffer']['shape']}"]
  seconds = p.get("roofline_seconds", {})
  out += [f"  {k:<24}{v:10.3f} s" for k, v in seconds.items()]
  return "\n".join(out)


def _define_flags():
  config_flags.DEFINE_config_file(
    "config", None, "Config file, e.g. experiments/pretrain.py:512."
  )
  flags.DEFINE_string("topology", None, "E.g. v5p:4x4x4, v5e:16x16, v6e:16x16.")
  flags.DEFINE_float(
    "batch_per_chip", None,
    "Samples per chip and microbatch; accumulates. Below 1 where chips share "
    "samples (mesh.seq, mesh.tensor).",
  )  # fmt: skip
  flags.DEFINE_integer("slices", 1, "Slices of the topology, joined by DCN.")
  flags.DEFINE_integer("references", 0, "Reference images per sample.")
  flags.DEFINE_string("json", None, "File for the plan; a list with --search.")
  flags.DEFINE_bool("search", False, "Try meshes, microbatches and remat.")
  flags.DEFINE_bool("production", False, "Compile with all optimisations.")
  flags.mark_flags_as_required(["config", "topology"])


def main() -> int:
  """Entry point."""
  f = flags.FLAGS
  # A cached program would make the compile time meaningless.
  jax.config.update("jax_enable_compilation_cache", False)
  jax.config.update("jax_platforms", "cpu")
  lower_fns(f.config)
  devices = topology_devices(f.topology, f.slices)
  options = {"references": f.references, "production": f.production}
  if f.search:
    plans = search(f.config, f.topology, devices, **options)
    for one in plans:
      print(summary_line(one))
    result, fits = plans, bool(plans)
  else:
    config = f.config
    if f.batch_per_chip is not None:
      config = with_batch_per_chip(config, f.batch_per_chip, len(devices))
    result = plan(config, f.topology, devices, **options)
    print(describe(result))
    fits = all(p["fits"] for p in (result, result.get("rollout", result)))
  if f.json:
    store.write_json(f.json, result)
  return 0 if fits else 1


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
