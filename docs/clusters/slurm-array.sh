#!/usr/bin/env bash
# A shard of a sweep for each task of a Slurm array:
#
#   sbatch --array=1-8 docs/clusters/slurm-array.sh --all --variant both
#
# The arguments are those of `memsync run`. MEMSYNC names the program (memsync), OUT the
# result folder (study), on a file system that all nodes share; shard i writes OUT.i. A task
# that is started again goes on where it was stopped. See docs/clusters.md.
#SBATCH --job-name=memsync
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=memsync-%a.log
set -euo pipefail
shard=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN + 1))
exec "${MEMSYNC:-memsync}" run "$@" --shard "$shard/$SLURM_ARRAY_TASK_COUNT" --out "${OUT:-study}.$shard"
