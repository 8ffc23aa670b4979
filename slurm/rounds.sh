# Functions that the sbatch files share: run a step, and run the rounds of a run as steps. Source this file with `.`.
#
# SLURM starts a copy of the sbatch file, so this file is found from the job's working directory: the repository's root.
# serve_teacher needs SERVE and PAUSE, run_rounds needs NODES (the nodes that collect and train). DOCTOR_SKIPS names
# checks to leave out, such as that of a teacher that the job starts later.

. slurm/site.sh || return              # VENV, PATH, SRUN

stopping=no                            # yes: preempted, or shortly before the time limit
step=
trap 'stopping=yes; [ -z "$step" ] || stop_step' USR1 TERM   # bash runs it during `wait`, hence the & in step()

stop_step() {                          # srun forwards the signal, but drops it while it launches: send it twice
    kill -USR1 $step
    (sleep 5; kill -USR1 $step) 2>/dev/null &
}

step() {                               # run one step; the job ends if the step fails or is stopped
    code=75
    if [ $stopping = no ]; then
        "${SRUN[@]}" "$@" &
        step=$!
        while wait $step; code=$?; kill -0 $step 2>/dev/null; do :; done
        step=
    fi
    continue_or_exit
}

continue_or_exit() {                   # depending on the last command's code and on $stopping
    # Stopped by a signal and not by scancel: requeue for the rest of the run. The code alone does not tell: srun may
    # kill a step's last task when its first has stopped.
    if { [ $code = 75 ] || [ $stopping = yes ]; } && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T | head -n1)" = RUNNING ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    [ "$code $stopping" = "0 no" ] || exit $code
}

examine() {                            # arguments: a step that examines its nodes (not with DOCTOR=no, nor after a requeue)
    [ "$DOCTOR" = no ] || [ "${SLURM_RESTART_COUNT:-0}" != 0 ] ||
        step --kill-on-bad-exit=0 "$@" --skip "$DOCTOR_SKIPS"      # each node to its end
}

serve_teacher() {                      # arguments: srun options; keeps SERVE running on each of its nodes until the job ends
    local serve='while :; do "$@"; echo "$SLURMD_NODENAME: the server ended with code $?" >&2; sleep '$PAUSE'; done'
    "${SRUN[@]}" "$@" bash -c "$serve" serve $SERVE &
    serving=$!
    trap stop_teacher EXIT
}

stop_teacher() {
    trap - EXIT
    for _ in {1..120}; do                  # srun drops the signal while it launches
        kill $serving 2>/dev/null || return 0
        sleep 0.5
    done
    kill -KILL $serving
}

collect() {                            # arguments: RUN and a round; an sbatch file may define its own
    local share='exec megatron-dagger rollout "$@" --worker $SLURM_PROCID/$SLURM_NTASKS'
    step "${all[@]}" bash -c "$share" share "$1" --round "$2"           # one worker per node, each with its share
    step "${one[@]}" megatron-dagger rollout "$1" --round "$2"          # completes and seals the round
}

run_rounds() {                         # arguments: those of `megatron-dagger create`
    local run=$1 rounds round one=(--nodes=1 --ntasks=1) all=(--nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1)

    rounds=$("${SRUN[@]}" "${one[@]}" megatron-dagger create "$@" "training.parallel.nodes=$NODES")
    code=$?
    continue_or_exit
    examine "${all[@]}" megatron-dagger doctor "$run"
    for round in $rounds; do
        collect "$run" "$round"
        step "${all[@]}" megatron-dagger train "$run" --round "$round"  # ranks on all nodes
        step "${one[@]}" megatron-dagger evaluate "$run" --round "$round"
    done
    step "${one[@]}" megatron-dagger report "$run"
}
