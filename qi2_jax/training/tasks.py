# SPDX-License-Identifier: Apache-2.0
"""The objectives that `config.objective` may name."""

from qi2_jax.training.dmd_task import dmd_task
from qi2_jax.training.flow_task import flow_task
from qi2_jax.training.grpo_task import grpo_task
from qi2_jax.training.nft_task import nft_task
from qi2_jax.training.opd_task import opd_task
from qi2_jax.training.vae_task import vae_task

TASKS = {
  "vae": vae_task, "flow_matching": flow_task, "dmd": dmd_task,
  "flow_grpo": grpo_task, "nft": nft_task, "opd": opd_task,
}  # fmt: skip
