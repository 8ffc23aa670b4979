# What a job of the sbatch files does: steps, and the rounds of a run as steps. Read by them with `.`, not submitted.
#
# SLURM starts a copy of the sbatch file, so this one is found by the directory that the job runs in: the repository's
# root. It wants SRUN (an array: how a step is started), serve_teacher wants SERVE and PAUSE, and run_rounds wants
# NODES (how many collect and train).

asked=no                               # yes: preempted, or shortly before the time limit
step=
trap 'asked=yes; [ -z "$step" ] || ask' USR1 TERM   # bash answers in `wait`, hence the & below

ask() {                                # the step to stop: srun passes it on, but drops it while it launches
    kill -USR1 $step
    (sleep 5; kill -USR1 $step) 2>/dev/null &
}

step() {                               # one step of the job; the end of the job if it fails or is stopped
    code=75
    if [ $asked = no ]; then
        "${SRUN[@]}" "$@" &
        step=$!
        while wait $step; code=$?; kill -0 $step 2>/dev/null; do :; done
        step=
    fi
    go_on
}

go_on() {                              # or not: by the last command's code, and by whether we were asked to stop
    # Stopped as asked, and not by scancel: the rest of the run is still to be done. (Not by the code alone: srun
    # may kill a step's last task when its first has stopped.)
    if { [ $code = 75 ] || [ $asked = yes ]; } && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T | head -n1)" = RUNNING ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    [ "$code $asked" = "0 no" ] || exit $code
}

serve_teacher() {                      # options of its step; SERVE on each of its nodes, ended with the job
    local serve='while :; do "$@"; echo "$SLURMD_NODENAME: the server ended with code $?" >&2; sleep '$PAUSE'; done'
    "${SRUN[@]}" "$@" bash -c "$serve" serve $SERVE &
    serving=$!
    trap stop_teacher EXIT
}

stop_teacher() {
    trap - EXIT
    for _ in {1..120}; do                  # srun drops it while it launches
        kill $serving 2>/dev/null || return 0
        sleep 0.5
    done
    kill -KILL $serving
}

collect() {                            # RUN and a round; an sbatch file may have its own way
    local share='exec megatron-dagger rollout "$@" --worker $SLURM_PROCID/$SLURM_NTASKS'
    step "${all[@]}" bash -c "$share" share "$1" --round "$2"           # a worker a node, each its share
    step "${one[@]}" megatron-dagger rollout "$1" --round "$2"          # what is missing, and the seal
}

run_rounds() {                         # RUN and the words of `megatron-dagger create`
    local run=$1 rounds round one=(--nodes=1 --ntasks=1) all=(--nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1)

    rounds=$("${SRUN[@]}" "${one[@]}" megatron-dagger create "$@" "training.parallel.nodes=$NODES")
    code=$?
    go_on
    for round in $rounds; do
        collect "$run" "$round"
        step "${all[@]}" megatron-dagger train "$run" --round "$round"  # ranks on all nodes
        step "${one[@]}" megatron-dagger evaluate "$run" --round "$round"
    done
    step "${one[@]}" megatron-dagger report "$run"
}
