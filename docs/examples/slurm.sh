#!/bin/bash
# sbatch docs/examples/slurm.sh
# A teacher on two nodes of eight GPUs. Five minutes before the time is up, and when the job is pre-empted, the
# processes are asked to stop; they write a checkpoint, and the job goes back into the queue until the run has finished.
#SBATCH --job-name=distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -uo pipefail

export DISTILL_RUNS=${DISTILL_RUNS:-$HOME/runs}   # on a file system that every node sees
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240         # seconds that torchrun leaves for a checkpoint
run=imdb-teacher

if [ -f "$DISTILL_RUNS/$run/run.json" ]; then
  command=(distill teacher --resume "$run")
else
  command=(distill teacher --recipe imdb --name "$run")
fi

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 --rdzv_backend c10d \
  --rdzv_id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv_endpoint "$first:29500" -m "${command[@]}"
code=$?

# torchrun ends with 1 where its processes end with 75: the run itself says whether it can be gone on with.
if [ "$code" -ne 0 ] && grep -q '"status": "interrupted"' "$DISTILL_RUNS/$run/run.json"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
