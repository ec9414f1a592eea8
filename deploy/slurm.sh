#!/usr/bin/env bash
# Trains on several nodes under Slurm, and goes on by itself after the time limit or a preemption:
#   sbatch deploy/slurm.sh configs/mobv3.yaml run.out=/shared/out
# Change the lines marked CHANGE; everything behind the script's name goes to the training.
#SBATCH --job-name=fastdisco
# CHANGE: nodes, and GPUs of each node.  One task trains on each GPU.
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
# CHANGE: CPU cores for each GPU; they decode images where the GPU does not.
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# The log goes on where it was when the job is queued again.
#SBATCH --open-mode=append
#SBATCH --requeue
# Two minutes before the limit every rank gets SIGUSR1, saves a checkpoint and ends with 75.
#SBATCH --signal=USR1@120
set -u

# CHANGE: how a node gets at the installed fastdisco.
cd "${SLURM_SUBMIT_DIR:?start this script with sbatch}" || exit
source .venv/bin/activate

# One thread a rank for numpy and the like.  `data.threads` says how many threads decode.
export OMP_NUM_THREADS=1
# A rank that ends with an error ends the others, instead of leaving them to wait.
srun --kill-on-bad-exit=1 python fastdisco/train.py --config "$@"
code=$?
# 75: stopped and saved.  The same job continues it; any other code is the end.
if [ "$code" -eq 75 ]; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
