#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Environment of a training host. Source it; run, it prints what it would set.
#
#   . tpu_setup/env.sh tpu     or     . tpu_setup/env.sh gpu
#   tpu_setup/env.sh tpu --dry-run
#
# What you have set before stays and wins where both set the same flag.
# Each flag is taken from a published source, named beside it; none has been
# measured with this code.

_qi2_env_tpu() {
  local flags=''
  # An all-reduce followed by a slice becomes one reduce-scatter, which moves
  # half the bytes (AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py,
  # REDUCE_SCATTER_FUSION).
  flags+=' --xla_tpu_use_minor_sharding_for_major_trivial_input=true'
  flags+=' --xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1'
  # Gradients of data parallelism between slices travel while the next layers
  # compute (the same file, DATA_PARALLEL_OVERLAP). No effect in one slice.
  flags+=' --xla_tpu_enable_data_parallel_all_reduce_opt=true'
  flags+=' --xla_tpu_data_parallel_opt_different_sized_ops=true'
  export LIBTPU_INIT_ARGS="${flags# }${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
}

_qi2_env_gpu() {
  # Collectives overlap with compute (set in NVIDIA's JAX image,
  # https://docs.nvidia.com/jax-toolbox/environment-variables).
  local flags='--xla_gpu_enable_latency_hiding_scheduler=true'
  export XLA_FLAGS="$flags${XLA_FLAGS:+ $XLA_FLAGS}"
  # Leaves room for NCCL and cuDNN beside XLA's pool (0.9 as in
  # https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance;
  # JAX's own default is 0.75).
  export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
}

case ${1:-} in
  tpu) _qi2_env_tpu ;;
  gpu) _qi2_env_gpu ;;
  *) sed -n '3,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" ;;
esac

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  case ${1:-} in
    tpu) declare -p LIBTPU_INIT_ARGS ;;
    gpu) declare -p XLA_FLAGS XLA_PYTHON_CLIENT_MEM_FRACTION ;;
  esac
fi
