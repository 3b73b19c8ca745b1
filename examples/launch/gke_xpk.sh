#!/bin/bash
# CLUSTER=... IMAGE=... TPU_TYPE=v5litepod-16 examples/launch/gke_xpk.sh NAME RECIPE OUTPUT_DIR [key=value ...]
#
# One process per TPU host, on one slice or several (NUM_SLICES=2), as a workload of xpk on GKE. jax finds the processes
# by what GKE puts into their environment. IMAGE holds Tandem and the recipe (see Dockerfile); OUTPUT_DIR is on a
# Filestore share that the cluster mounts (`xpk storage attach`). The same command again, under another NAME, resumes.
# DRY_RUN=1 prints what xpk would do.

set -euo pipefail

if [[ $# -lt 3 ]]; then
  echo "usage: CLUSTER=... IMAGE=... TPU_TYPE=... $0 NAME RECIPE OUTPUT_DIR [key=value ...]" >&2
  exit 2
fi
: "${CLUSTER:?the name of the GKE cluster}" "${IMAGE:?the container image}" "${TPU_TYPE:?for example v5litepod-16}"
name=$1
recipe=$2
output_dir=$3
shift 3

options=()
if [[ ${DRY_RUN:-0} == 1 ]]; then
  options+=(--dry-run --skip-validation)
fi

# Quoted once more, for the shell in the container.
command=$(printf '%q ' grpo train "$recipe" "output_dir=$output_dir" "$@")

# --restart-on-user-code-failure: a host that is lost ends the others with an error, and all start again from the last
# checkpoint. The grace period is for the last step and its checkpoint.
xpk workload create \
  --cluster "$CLUSTER" \
  --workload "$name" \
  --tpu-type "$TPU_TYPE" \
  --num-slices "${NUM_SLICES:-1}" \
  --docker-image "$IMAGE" \
  --max-restarts 5 \
  --restart-on-user-code-failure \
  --termination-grace-period-seconds 300 \
  --command "$command" \
  "${options[@]}"
