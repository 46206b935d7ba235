# shellcheck shell=bash
# What the jobs of this folder share: where things are, containers, the health check, attempts, signals, exit codes.
# Read by a batch script, which Slurm has copied elsewhere, as
#
#     source "${SAMEROUTE_ROOT:=$SLURM_SUBMIT_DIR}/scripts/slurm/common.sh"
#
# Variables (docs/launch.md has them all): SAMEROUTE_ROOT, SAMEROUTE_RUNTIME, SAMEROUTE_IMAGE, SAMEROUTE_MOUNTS,
# SAMEROUTE_ROLLOUT_NODES, SAMEROUTE_OWN_RAY, SAMEROUTE_LOGS, SAMEROUTE_SCRATCH, SAMEROUTE_MAX_ATTEMPTS.

set -euo pipefail

FAILED_HEALTH=3 # exit codes; those of `sameroute` pass through
SAVED=75        # `sameroute train` stopped by a signal, with a checkpoint to go on from

: "${SAMEROUTE_RUNTIME:=bare}" "${SAMEROUTE_IMAGE:=}" "${SAMEROUTE_MOUNTS:=}" "${SAMEROUTE_ROLLOUT_NODES:=0}"
: "${SAMEROUTE_OWN_RAY:=}"
: "${SAMEROUTE_SCRATCH:=/tmp}" "${SAMEROUTE_MAX_ATTEMPTS:=100}" "${SAMEROUTE_LOGS:=$SAMEROUTE_ROOT/runs/slurm}"
SLURM_FOLDER=$SAMEROUTE_ROOT/scripts/slurm
ATTEMPT=${SLURM_RESTART_COUNT:-0}
ATTEMPT_FOLDER=$SAMEROUTE_LOGS/$SLURM_JOB_ID/attempt_$ATTEMPT

say() { echo "sameroute: $*" >&2; }

# Names of the nodes, one a line, in the order of the allocation; of all components where it is heterogeneous.
all_nodes() {
    local group
    if [ -n "${SLURM_HET_SIZE:-}" ]; then
        for ((group = 0; group < SLURM_HET_SIZE; group++)); do nodes_of_group "$group"; done
    else
        scontrol show hostnames "$SLURM_JOB_NODELIST"
    fi
}

nodes_of_group() {
    local variable=SLURM_JOB_NODELIST_HET_GROUP_$1
    scontrol show hostnames "${!variable}"
}

# The rollout nodes: all components but the first, or the last SAMEROUTE_ROLLOUT_NODES of a homogeneous allocation.
rollout_nodes() {
    local group
    if [ -n "${SLURM_HET_SIZE:-}" ]; then
        for ((group = 1; group < SLURM_HET_SIZE; group++)); do nodes_of_group "$group"; done
    elif [ "$SAMEROUTE_ROLLOUT_NODES" -gt 0 ]; then
        all_nodes | tail -n "$SAMEROUTE_ROLLOUT_NODES"
    fi
}

# A command on every node, one task a node, in the chosen runtime: on_nodes [srun's arguments] -- COMMAND...
on_nodes() {
    local srun=(--ntasks-per-node=1 --cpu-bind=none) prefix=()
    if [ -n "${SLURM_HET_SIZE:-}" ]; then
        srun+=("--het-group=0-$((SLURM_HET_SIZE - 1))")
    else
        srun+=("--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_JOB_NUM_NODES")
    fi
    while [ "$1" != -- ]; do srun+=("$1") && shift; done
    shift
    in_runtime
    exec ${WITHIN_S:+timeout "$WITHIN_S"} srun "${srun[@]}" "${prefix[@]}" "$@"
}

# The runtime as arguments of srun (array `srun`) and words before the command (array `prefix`), both of the caller.
in_runtime() {
    local mounts="$SAMEROUTE_ROOT:$SAMEROUTE_ROOT,$SAMEROUTE_LOGS:$SAMEROUTE_LOGS,$SAMEROUTE_SCRATCH:$SAMEROUTE_SCRATCH"
    mounts+=${SAMEROUTE_MOUNTS:+,$SAMEROUTE_MOUNTS}
    case $SAMEROUTE_RUNTIME in
    bare) PATH=$SAMEROUTE_ROOT/.venv/bin:$PATH ;;
    pyxis) # enroot's plugin of Slurm
        srun+=("--container-image=$SAMEROUTE_IMAGE" "--container-mounts=$mounts" "--container-workdir=$SAMEROUTE_ROOT")
        srun+=(--no-container-mount-home)
        ;;
    apptainer)
        prefix=(apptainer exec --bind "$mounts" --pwd "$SAMEROUTE_ROOT" "$SAMEROUTE_IMAGE")
        if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then prefix=(apptainer exec --nv "${prefix[@]:2}"); fi
        ;;
    esac
}

# Exits with 2 for settings that cannot work, and makes the folder of this attempt.
begin() {
    case $SAMEROUTE_RUNTIME in
    bare) ;;
    pyxis | apptainer)
        if [ -z "$SAMEROUTE_IMAGE" ]; then
            say "SAMEROUTE_RUNTIME=$SAMEROUTE_RUNTIME needs SAMEROUTE_IMAGE, a path or an address of the image"
            exit 2
        fi
        ;;
    *)
        say "SAMEROUTE_RUNTIME is bare, pyxis or apptainer, not $SAMEROUTE_RUNTIME"
        exit 2
        ;;
    esac
    if [ -z "${SLURM_HET_SIZE:-}" ] && [ "$SAMEROUTE_ROLLOUT_NODES" -ge "$SLURM_JOB_NUM_NODES" ] \
        && [ "$SAMEROUTE_ROLLOUT_NODES" -gt 0 ]; then
        say "SAMEROUTE_ROLLOUT_NODES=$SAMEROUTE_ROLLOUT_NODES of $SLURM_JOB_NUM_NODES nodes leave none for the trainer"
        exit 2
    fi
    if [ -n "$SAMEROUTE_OWN_RAY" ] && [ "$(all_nodes | wc -l)" != 1 ]; then
        say "SAMEROUTE_OWN_RAY is for a run on one node, and the job has $(all_nodes | wc -l); submit it with --nodes 1"
        exit 2
    fi
    set -a # for the steps
    # shellcheck source=scripts/slurm/network.env
    source "$SLURM_FOLDER/network.env"
    set +a
    export SAMEROUTE_ROOT SAMEROUTE_SCRATCH SAMEROUTE_OWN_RAY ATTEMPT_FOLDER
    mkdir -p "$ATTEMPT_FOLDER"
    cd "$SAMEROUTE_ROOT"
    say "attempt $ATTEMPT of job $SLURM_JOB_ID on $(all_nodes | paste -sd ' '); logs in $ATTEMPT_FOLDER"
}

# Every node is looked at before anything starts; exits with 3 where one is not well, and names it.
check_health() {
    SAMEROUTE_PROBE=$ATTEMPT_FOLDER/probe
    export SAMEROUTE_PROBE
    echo "$SLURM_JOB_ID" > "$SAMEROUTE_PROBE"
    (on_nodes --output="$ATTEMPT_FOLDER/health_%N.log" -- bash "$SLURM_FOLDER/health.sh") || {
        say "the health check failed:"
        grep -h '^unwell' "$ATTEMPT_FOLDER"/health_*.log >&2 || true
        say "leave such a node out with sbatch --exclude=NODE"
        exit $FAILED_HEALTH
    }
}

# `sameroute train` on one Ray cluster over all nodes; exits with its code. Arguments: CONFIG [section.field=value ...]
#
# USR1, which Slurm sends to the batch script before the time limit (--signal), is passed on as a request to save. It is
# a file, and ray_node.sh gives the signal to the driver alone: Slurm's own forwarding reaches every process of the step,
# Ray's daemons too, which die of it. A run that has saved exits with 75, and the job is put back into the queue. TERM is
# scancel, or pre-emption, after which Slurm itself puts the job back: the step gets it from Slurm.
run_training() {
    local code step cancelled=""
    begin
    check_health
    RAY_PORT=$((6400 + SLURM_JOB_ID % 1000)) # jobs that share a node do not share a cluster
    ROLLOUT_NODES=$(rollout_nodes)
    RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    NODES=$(all_nodes | wc -l)
    export RAY_PORT ROLLOUT_NODES RAY_AUTH_MODE RAY_AUTH_TOKEN NODES ATTEMPT
    HEAD_NODE=$(all_nodes | head -n 1) HEAD_ADDRESS=$(bash "$SLURM_FOLDER/address.sh")
    export HEAD_NODE HEAD_ADDRESS
    trap 'touch "$ATTEMPT_FOLDER/save"' USR1
    trap 'cancelled=yes' TERM
    (on_nodes --no-kill --output="$ATTEMPT_FOLDER/train_%N.log" -- bash "$SLURM_FOLDER/ray_node.sh" "$@") &
    step=$!
    while kill -0 "$step" 2> /dev/null; do wait "$step" || true; done # a signal ends a wait, not the step
    wait "$step" && code=0 || code=$?
    # The step's code is also that of a node that was lost, without which the run has gone on.
    if [ -s "$ATTEMPT_FOLDER/run_ended" ]; then code=$(cat "$ATTEMPT_FOLDER/run_ended"); fi
    tail -n 30 "$ATTEMPT_FOLDER/train_$HEAD_NODE.log" >&2 || true
    finish "$code" "$cancelled"
}

# Whether a node of the job does not answer. `--no-kill` keeps a job whose node is lost, and keeps Slurm from putting it
# back into the queue.
node_lost() {
    ! (WITHIN_S=60 && on_nodes --output=/dev/null -- true) 2> /dev/null
}

# Whether Slurm has the job as running. One that scancel ends may end its step before this script has its TERM, and what
# is put back into the queue while it is ended starts again.
running() {
    [ "$(scontrol show job "$SLURM_JOB_ID" 2> /dev/null | grep -m 1 -o 'JobState=[A-Z_]*')" = JobState=RUNNING ]
}

# Exit with the code; a run that saved, or failed for want of a node, goes back into the queue first, if it was not
# cancelled.
finish() {
    local code=$1 cancelled=$2 again=""
    say "attempt $ATTEMPT ended with exit code $code${cancelled:+, cancelled}"
    case $code in
    0 | 2 | "$FAILED_HEALTH" | 130) ;;
    "$SAVED") again=yes ;;
    *)
        if [ -z "$cancelled" ] && running && node_lost; then
            say "a node of the job is lost"
            again=yes
        fi
        ;;
    esac
    if [ -n "$again" ] && ! running; then
        say "Slurm does not have the job as running, and it is not put back into the queue; submit it again if nobody cancelled it"
        again=""
    fi
    if [ -n "$again" ] && [ -z "$cancelled" ]; then
        if [ "$ATTEMPT" -ge "$SAMEROUTE_MAX_ATTEMPTS" ]; then
            say "SAMEROUTE_MAX_ATTEMPTS=$SAMEROUTE_MAX_ATTEMPTS is reached: not put back into the queue"
        elif scontrol requeue "$SLURM_JOB_ID"; then # ends this script, by a signal
            trap - TERM
            sleep 60
        else
            say "Slurm did not put the job back into the queue; submit it again"
        fi
    fi
    exit "$code"
}
