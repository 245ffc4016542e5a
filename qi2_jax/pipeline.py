# SPDX-License-Identifier: Apache-2.0
"""A trained workdir as one object that makes images."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from qi2_jax.conditioning.conditioner import to_uint8, to_unit
from qi2_jax.errors import InputError
from qi2_jax.flow.generate import Generator, Request, SamplingConfig
from qi2_jax.models import mmdit
from qi2_jax.training import build, checkpoints


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """MMDiT, VAE and conditioner of one training workdir.

  Attributes:
    generator: the modules.
    params: MMDiT parameters (the EMA of the run).
    vae_variables: VAE weights and latent statistics.
    sampling: the run's own sampling defaults.
    step: training step of the weights.
    side: side of the square whose area most training images had, in pixels.
    notes: what a reader of the images must know (stand-ins).
  """

  generator: Generator
  params: dict
  vae_variables: dict
  sampling: SamplingConfig
  step: int
  side: int
  notes: tuple[str, ...]

  @classmethod
  def load(cls, workdir: str) -> "Pipeline":
    """Loads the newest checkpoint of a flow-matching workdir.

    Raises:
      InputError: the folder is no such workdir or holds no checkpoint.
    """
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
      raise InputError(
        f"{workdir} is no training workdir (no config.json); pass the "
        "--workdir of a finished experiments/pretrain.py or sft.py run."
      )
    with open(path) as file:
      config = ConfigDict(json.load(file))
    if config.objective != "flow_matching":
      raise InputError(
        f"{workdir} trained a {config.objective}, which makes no images from "
        "prompts; pass a pretrain or sft workdir."
      )
    vae, vae_variables = checkpoints.load_vae(workdir)
    conditioner = build.conditioner(config.text, vae.config.factor)
    model = mmdit.MMDiT(
      build.mmdit_config(
        config.model, vae.config.z_dim, conditioner.encoder.width
      )
    )
    store = checkpoints.CheckpointStore(workdir, read_only=True)
    step = store.latest()
    if step is None:
      raise InputError(
        f"{workdir} holds no finished checkpoint yet; train on first."
      )
    abstract = jax.eval_shape(
      lambda: mmdit.init_params(model, jax.random.key(0))
    )
    params = store.restore_part(step, "ema", _on_one_device(abstract))
    store.close()
    return cls(
      generator=Generator(model, vae, conditioner),
      params=params,
      vae_variables=vae_variables,
      sampling=build.sampling_config(config),
      step=step,
      side=round(math.sqrt(math.prod(config.data.buckets[0]))),
      notes=(f"text encoder: {conditioner.encoder.description}",),
    )

  def untrained(self) -> "Pipeline":
    """The same architecture with fresh random weights."""
    params = mmdit.init_params(self.generator.model, jax.random.key(1))
    # The head starts at zero, which would return the noise unchanged.
    leaves, tree = jax.tree.flatten(params)
    leaves = [
      leaf if leaf.any() else 0.02 * jax.random.normal(
        jax.random.key(i), leaf.shape
      )
      for i, leaf in enumerate(leaves)
    ]  # fmt: skip
    return dataclasses.replace(
      self, params=jax.tree.unflatten(tree, leaves), step=0
    )

  def __call__(
    self, requests: Sequence[Request], config: SamplingConfig | None = None,
    progress: Callable[[int], None] = lambda n: None,
  ) -> list[np.ndarray]:  # fmt: skip
    """Images of `requests`, in order: float32 `[H, W, C]` in [-1, 1].

    Args:
      requests: what to make.
      config: how to sample; the run's defaults if None.
      progress: called with the number of images finished.

    Raises:
      InputError: a size that the VAE cannot produce.
    """
    channels = self.generator.vae.config.image_channels
    requests = [
      dataclasses.replace(
        r,
        references=tuple(_with_alpha(i, channels) for i in r.references),
      )
      for r in requests
    ]
    return self.generator(
      self.params,
      self.vae_variables,
      requests,
      config or self.sampling,
      progress,
    )

  def roundtrip(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """VAE encode and decode of uint8 `[H, W, 3]` images of any sizes.

    Images of one size run as batches of `sampling.batch_size`, so that a
    size costs one compilation.
    """
    channels = self.generator.vae.config.image_channels
    size = self.sampling.batch_size
    groups: dict[tuple, list[int]] = {}
    for i, image in enumerate(images):
      groups.setdefault(image.shape, []).append(i)
    out: list = [None] * len(images)
    for indices in groups.values():
      for start in range(0, len(indices), size):
        chosen = indices[start : start + size]
        padded = chosen + [chosen[-1]] * (size - len(chosen))
        batch = np.stack([_with_alpha(images[i], channels) for i in padded])
        made = _roundtrip(self.generator.vae, self.vae_variables, batch)
        for i, image in zip(chosen, to_uint8(np.asarray(made))):
          out[i] = image[..., :3]
    return out


def _roundtrip_fn(vae, variables, image):
  latents = vae.apply(variables, to_unit(image), method="encode")
  return vae.apply(variables, latents, method="decode")


_roundtrip = jax.jit(_roundtrip_fn, static_argnums=0)


def _with_alpha(image: np.ndarray, channels: int) -> np.ndarray:
  """RGB to opaque RGBA where the VAE has four channels."""
  if image.shape[-1] == channels:
    return image
  opaque = np.full((*image.shape[:2], 1), 255, np.uint8)
  return np.concatenate([image[..., :3], opaque], axis=-1)


def _on_one_device(abstract):
  """Shapes with a concrete sharding, so that a pod's checkpoint loads here."""
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
    abstract,
  )
