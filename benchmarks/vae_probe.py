# SPDX-License-Identifier: Apache-2.0
"""Does alignment make latents easier to read? On rendered shapes, two steps.

    python benchmarks/vae_probe.py teacher --out=runs/teacher
    python -m qi2_jax.train --config=experiments/vae.py:tiny \\
      --workdir=runs/aligned --config.dinov2.random_features=False \\
      --config.dinov2.path=runs/teacher
    python benchmarks/vae_probe.py probe --models=runs/aligned,runs/plain

`teacher` trains a tiny network of DINOv2's form (1 minute on 2 CPU cores) to
name colours, shapes and their number, and writes it as a transformers folder.
It stands in for DINOv2: it knows what the rendered task is about and nothing
else, and a run aligned to it says how the method works, not how good a
full-size VAE gets. `probe` fits a linear classifier to the mean latent of an
image and prints its accuracy on images that neither it nor the teacher saw.
"""

import json
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from data_pipelines.shapes import prompts
from data_pipelines.shapes import vocabulary as vocab
from data_pipelines.shapes.render import render
from qi2_jax import cli, evaluate_vae
from qi2_jax.conditioning.conditioner import encode_images, to_unit
from qi2_jax.errors import InputError
from qi2_jax.evaluation.vae_scores import padded
from qi2_jax.interop import dinov2 as files
from qi2_jax.interop import mapping
from qi2_jax.interop.published import write_json
from qi2_jax.interop.safetensors_io import write_tensors
from qi2_jax.models import dinov2
from qi2_jax.training import build

SIDE = 64
# What a scene is asked about, and the kind of scene that is asked.
ATTRIBUTES = {"shape": "single", "colour": "single", "count": "counting"}
_RIDGE = 1e-2


def scenes(kind: str, split: str, count: int, seed: int = 0):
  """`(uint8 images [N, S, S, 3], scenes)` of the rendered task."""
  made = [
    prompts.sample_split(
      kind, split, np.random.default_rng([seed, *kind.encode(), i])
    ).scene
    for i in range(count)
  ]
  return np.stack([render(scene, SIDE, SIDE) for scene in made]), made


def label(attribute: str, scene) -> int:
  """The class of a scene."""
  if attribute == "count":
    return len(scene.items) - 1
  if attribute == "shape":
    return vocab.SHAPES.index(scene.items[0].shape)
  return list(vocab.COLOURS).index(scene.items[0].colour)


def presence(scene) -> np.ndarray:
  """What is in a scene: shapes, colours, and how many of them, 0 or 1 each."""
  items = scene.items
  found = [any(i.shape == s for i in items) for s in vocab.SHAPES]
  found += [any(i.colour == c for i in items) for c in vocab.COLOURS]
  found += [len(items) == n + 1 for n in range(4)]
  return np.float32(found)


def train_teacher(steps: int, count: int, batch: int = 64):
  """`(config, params, mean accuracy of the last 50 steps)`."""
  config = dinov2.PRESETS["tiny"]
  model = dinov2.DINOv2(config)
  sets = [scenes(k, "seen", count) for k in ("single", "position", "counting")]
  images = np.concatenate([images for images, _ in sets])
  labels = np.stack([presence(s) for _, made in sets for s in made])
  grid = (SIDE // 16,) * 2
  tx = optax.adamw(optax.cosine_decay_schedule(1e-3, steps))

  def loss(params, image, target):
    view = dinov2.preprocess(to_unit(image), grid)
    features = model.apply({"params": params["net"]}, view)
    logits = features.mean(axis=(1, 2)) @ params["head"]
    right = ((logits > 0) == (target > 0.5)).mean()
    return optax.sigmoid_binary_cross_entropy(logits, target).mean(), right

  @jax.jit
  def step(params, state, image, target):
    grads, right = jax.grad(loss, has_aux=True)(params, image, target)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, right

  params = {
    "net": jax.jit(lambda: dinov2.init_params(model, jax.random.key(0)))(),
    "head": jnp.zeros((config.width, labels.shape[1])),
  }
  state, rng, history = tx.init(params), np.random.default_rng(0), []
  for _ in range(steps):
    rows = rng.integers(0, len(images), batch)
    params, state, right = step(params, state, images[rows], labels[rows])
    history.append(float(right))
  return config, params["net"], float(np.mean(history[-50:]))


def save_teacher(path: str, config: dinov2.DINOv2Config, params) -> None:
  """Writes a transformers folder, which `config.dinov2.path` reads.

  Raises:
    InputError: the folder exists.
  """
  if os.path.lexists(path):
    raise InputError(f"{path} exists; choose another --out.")
  os.makedirs(path)
  plan, tensors = mapping.iter_export(params, files.table)
  write_tensors(path, "model", plan, tensors)
  published = {
    "model_type": "dinov2", "num_hidden_layers": config.num_layers,
    "hidden_size": config.width, "num_attention_heads": config.num_heads,
    "mlp_ratio": config.mlp_width / config.width,
    "patch_size": config.patch_size,
    "image_size": config.side * config.patch_size,
    "layer_norm_eps": config.eps,
  }  # fmt: skip
  write_json(os.path.join(path, "config.json"), published)


def fit_probe(x_ND: np.ndarray, y_N: np.ndarray) -> Callable:
  """Ridge regression to one-hot classes on whitened features: x -> classes."""
  mean, std = x_ND.mean(0), x_ND.std(0) + 1e-6

  def design(x):
    return np.concatenate([(x - mean) / std, np.ones((len(x), 1))], axis=1)

  a, target = design(x_ND), np.eye(y_N.max() + 1)[y_N]
  gram = a.T @ a + _RIDGE * len(a) * np.eye(a.shape[1])
  weights = np.linalg.solve(gram, a.T @ target)
  return lambda x: (design(x) @ weights).argmax(1)


def mean_latents(path: str) -> Callable[[np.ndarray], np.ndarray]:
  """uint8 images `[N, S, S, 3]` to mean normalised latents `[N, Z]`."""
  module, variables = build.load_vae(path)
  run = jax.jit(lambda x: encode_images(module, variables, x).mean(axis=(1, 2)))

  def encode(images, size=100):
    parts = [
      padded(images[i : i + size], module.config.factor,
             module.config.image_channels)
      for i in range(0, len(images), size)
    ]  # fmt: skip
    return np.concatenate([np.asarray(run(part)) for part in parts])

  return encode


def probe(encode: Callable, count: int) -> dict[str, float]:
  """Accuracy of a linear probe on new images, by attribute.

  Both sets are of the seen split: the other one holds back pairs of shape and
  colour, so that one would speak for the other, wrongly.
  """
  out = {}
  for attribute, kind in ATTRIBUTES.items():
    data = [scenes(kind, "seen", count, seed) for seed in (1, 2)]
    features = [np.float64(encode(images)) for images, _ in data]
    labels = [np.array([label(attribute, s) for s in made]) for _, made in data]
    predict = fit_probe(features[0], labels[0])
    out[attribute] = float(np.mean(predict(features[1]) == labels[1]))
  return out


def _probe_all(paths: Sequence[str], count: int) -> None:
  for name, path in zip(evaluate_vae.labels(paths), paths):
    print(json.dumps({"model": name, **probe(mean_latents(path), count)}))


def _define_flags() -> None:
  flags.DEFINE_string("out", None, "Folder for the teacher.")
  flags.DEFINE_integer("steps", 1500, "Of the teacher.")
  flags.DEFINE_list("models", [], "VAEs to probe, comma-separated.")
  flags.DEFINE_integer("count", 2000, "Scenes per kind.")


def main(words: list[str]) -> int:
  """Entry point.

  Args:
    words: `["teacher"]` or `["probe"]`.
  """
  values = flags.FLAGS
  if words == ["teacher"] and values.out:
    config, params, right = train_teacher(values.steps, values.count)
    save_teacher(values.out, config, params)
    print(f"{values.out}: {right:.1%} of the labels right in training")
  elif words == ["probe"] and values.models:
    _probe_all(values.models, values.count)
  else:
    raise InputError(
      "give `teacher --out=DIR` or `probe --models=A,B`; see --help."
    )
  return 0


if __name__ == "__main__":
  _define_flags()
  cli.run_words(main)
