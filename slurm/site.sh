# The settings of your cluster, in one place: edit them once, for all sbatch files. slurm/rounds.sh reads this file.

# The environment with the engines: .venv-cuda (tools/setup --cuda), or without it .venv (built for the CPU by tools/setup)
if [ -z "${VENV:-}" ]; then
    VENV=$PWD/.venv-cuda
    [ -d "$VENV" ] || VENV=$PWD/.venv
fi
export PATH="$VENV/bin:$PATH"
SRUN=(srun --kill-on-bad-exit=1 --wait=0)                 # starts a step, which ends when its slowest task has ended
DOCTOR=${DOCTOR:-yes}                  # no: start without examining the nodes first
# In a container (pyxis and enroot), with the environment in the image instead of VENV:
# SRUN+=(--container-image=IMAGE --container-mounts="$PWD" --container-workdir="$PWD")
# export MEGATRON_DAGGER_CACHE=$SCRATCH/megatron-dagger   # packages and tasks, kept between runs
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0    # if the default network interface is the wrong one
