#!/bin/bash
# sbatch examples/launch/slurm.sh RECIPE OUTPUT_DIR [key=value ...]
#
# One process per GPU. jax finds the processes by SLURM's own variables: no address, no number of hosts is given here.
# OUTPUT_DIR is on a disk that all nodes share. The same command again resumes the run.
#
#SBATCH --job-name=grpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

readonly MAX_RESTARTS=5

if [[ $# -lt 2 ]]; then
  echo "usage: sbatch $0 RECIPE OUTPUT_DIR [key=value ...]" >&2
  exit 2
fi
recipe=$1
output_dir=$2
shift 2

# --kill-on-bad-exit: when one process dies the others can only wait for it; srun says which one it was.
# --gpu-bind=none: jax gives each process the GPU of its local number, so each must see all of its node.
status=0
srun --kill-on-bad-exit=1 --label --gpu-bind=none \
  grpo train "$recipe" "output_dir=$output_dir" "$@" || status=$?

# --signal above lets a run save itself before the time is up. A run that failed goes on from its last checkpoint, but
# not one whose command was wrong (exit status 2).
if [[ $status -ne 0 && $status -ne 2 && ${SLURM_RESTART_COUNT:-0} -lt $MAX_RESTARTS ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
