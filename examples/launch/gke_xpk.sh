#!/bin/bash
# CLUSTER=... IMAGE=... TPU_TYPE=v5litepod-16 examples/launch/gke_xpk.sh NAME RECIPE OUTPUT_DIR [key=value ...]
#
# One process per TPU host, on one slice or several (NUM_SLICES=2), as a workload of xpk on GKE. jax finds the processes
# by what GKE puts into their environment. IMAGE holds Tandem and the recipe (see Dockerfile); OUTPUT_DIR is on a
# Filestore share that the cluster mounts (`xpk storage attach ... --auto-mount=true`). The same command again, under
# another NAME, resumes. PROJECT and ZONE are those of gcloud when left out. DRY_RUN=1 ZONE=... prints what xpk would do,
# the JobSet included, and needs neither gcloud nor a cluster.

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
if [[ -n ${PROJECT:-} ]]; then
  options+=(--project "$PROJECT")
fi
if [[ -n ${ZONE:-} ]]; then
  options+=(--zone "$ZONE")
fi
if [[ ${DRY_RUN:-0} == 1 ]]; then
  : "${ZONE:?a dry run does not ask gcloud for it; for example us-west4-a}"
  options+=(--dry-run --skip-validation)
fi

# Quoted once more, for the shell in the container.
command=$(printf '%q ' grpo train "$recipe" "output_dir=$output_dir" "$@")

# A host that is lost ends the others with exit status 134, for which xpk starts all again, from the last checkpoint. So
# it does here after an exception (1), but not for a command that was wrong (2). The grace period is for the last step
# and its checkpoint.
xpk workload create \
  --cluster "$CLUSTER" \
  --workload "$name" \
  --tpu-type "$TPU_TYPE" \
  --num-slices "${NUM_SLICES:-1}" \
  --docker-image "$IMAGE" \
  --max-restarts 5 \
  --restart-on-exit-codes 1 \
  --termination-grace-period-seconds 300 \
  --command "$command" \
  "${options[@]}"
