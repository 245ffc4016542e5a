# SPDX-License-Identifier: Apache-2.0
"""The f16c64 VAE from scratch, reconstruction loss only.

    python -m qi2_jax.train --config=experiments/vae.py:tiny \\
      --workdir=runs/vae

Variants: `tiny` (40 steps, a smoke test of under a minute on 2 CPU cores),
`demo` (the VAE of `make demo`, minutes on 2 CPU cores), `256` (full size,
needs accelerators; never run by us at scale). `tiny` and `demo` fold 4x4
patches before the first convolution. All step counts and learning rates here
are ours: the report gives none.
"""

from experiments import common


def _base():
  config = common.base_config()
  config.objective = "vae"
  config.data.t2i = 0.5
  config.data.ti2i = 0.5
  # Width of the quadratic bottom of the L1 (0: plain L1).
  config.l1_smoothing = 0.0
  # Batches over which the latent mean and std are taken at the end.
  config.latent_stat_batches = 16
  return config


def _full():
  config = _base()
  config.num_steps = 200_000
  config.data.batch_size = 256
  config.data.buckets = ((256, 256), (224, 288), (288, 224))
  config.optimizer.learning_rate = 1e-4
  return config


def _tiny():
  config = common.make_smoke(_base())
  config.l1_smoothing = 0.3
  config.optimizer.learning_rate = 5e-4
  return config


def _demo():
  config = common.make_tiny(_base())
  # One shape, one compilation; convolutions carry over to the others.
  config.data.buckets = ((64, 64),)
  config.num_steps = 2400
  config.data.batch_size = 8
  config.l1_smoothing = 0.3
  config.optimizer.learning_rate = 5e-4
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 20
  config.optimizer.b2 = 0.99
  config.optimizer.weight_decay = 0.0
  config.log_every = 100
  config.save_every = 800
  config.preview_every = 1200
  return config


def get_config(arg="256"):
  """Config of the VAE stage; see the module docstring for variants."""
  return common.choose(arg, {"256": _full, "tiny": _tiny, "demo": _demo})()
