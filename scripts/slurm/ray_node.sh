#!/usr/bin/env bash
# One node of a training job, as the task of a Slurm step: Ray's processes, and on the first node the driver too.
# Arguments: those of `sameroute train`. The variables come from common.sh.
#
# With SAMEROUTE_OWN_RAY, on one node, the run starts a Ray of its own, as it does outside of Slurm.
# Ray runs in the foreground (--block), so that its processes stay children of the task. Some of them outlive their
# parent for seconds, so in the end whatever carries this task's mark in its environment is killed.
set -euo pipefail

node=${SLURMD_NODENAME:-$(hostname)}
slots=${SLURM_GPUS_ON_NODE:-0}
: "${SAMEROUTE_OWN_RAY:=}"
if [ "$slots" = 0 ]; then slots=${SLURM_CPUS_ON_NODE:-$(nproc)}; fi
kind=trainer
if grep -qx "$node" <<< "$ROLLOUT_NODES"; then kind=rollout; fi

# A folder of its own on the node: of this job, so that two jobs or two users do not meet in /tmp/ray.
export TMPDIR=$SAMEROUTE_SCRATCH/sr$SLURM_JOB_ID
mkdir -p "$TMPDIR"
ray=(--node-ip-address="$(bash "$SAMEROUTE_ROOT/scripts/slurm/address.sh")" --temp-dir="$TMPDIR" --block)
ray+=(--num-cpus="${SLURM_CPUS_ON_NODE:-$(nproc)}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats)
if [ -n "$ROLLOUT_NODES" ]; then ray+=(--resources="{\"$kind\": $slots}"); fi
export RAY_worker_niceness=0
export SAMEROUTE_TASK_MARK=$SLURM_JOB_ID.$ATTEMPT.$node
export SPT_NOENV=1 # else Ray's process titles are written over the environment
driver="" ended=""

# shellcheck disable=SC2329 # the trap calls it
clean_up() {
    local pid
    if [ "$node" = "$HEAD_NODE" ]; then touch "$ATTEMPT_FOLDER/head_ended" || true; fi
    for pid in $(grep -lzsx "SAMEROUTE_TASK_MARK=$SAMEROUTE_TASK_MARK" /proc/[0-9]*/environ | tr -dc '0-9\n'); do
        kill -KILL "$pid" 2> /dev/null || true # gone meanwhile, or the grep itself
    done
    rm -rf "$TMPDIR"
}
trap clean_up EXIT
trap 'ended=yes; [ -z "$driver" ] || kill -TERM "$driver" 2> /dev/null || true' TERM
trap '' USR1

reachable() { timeout 10 bash -c "exec 3<> /dev/tcp/$HEAD_ADDRESS/$RAY_PORT" 2> /dev/null; }

# Whether the head is there; one probe that fails may be the network's.
present() {
    local probe
    for probe in 1 2 3; do
        if reachable; then return 0; fi
        if [ "$probe" -lt 3 ]; then sleep 1; fi
    done
    return 1
}

stop_ray() {
    kill -TERM "$ray_pid" 2> /dev/null || true
    for _ in {1..100}; do
        kill -0 "$ray_pid" 2> /dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$ray_pid" 2> /dev/null || true
}

if [ "$node" != "$HEAD_NODE" ]; then
    until reachable; do
        if [ -n "$ended" ] || [ -e "$ATTEMPT_FOLDER/head_ended" ]; then exit 0; fi # the head says why
        sleep 0.5
    done
    ray start --address="$HEAD_ADDRESS:$RAY_PORT" "${ray[@]}" &> "$ATTEMPT_FOLDER/ray_$node.log" &
    ray_pid=$!
    # The head is gone when the driver has ended.
    while kill -0 "$ray_pid" 2> /dev/null && present; do sleep 1; done
    stop_ray
    if reachable && [ -z "$ended" ]; then
        echo "sameroute: Ray on $node ended before the run did" >&2
        exit 1
    fi
    exit 0
fi

allocated=()
if [ -z "$SAMEROUTE_OWN_RAY" ]; then
    ray start --head --port="$RAY_PORT" --include-dashboard=false "${ray[@]}" &> "$ATTEMPT_FOLDER/ray_$node.log" &
    ray_pid=$!
    until reachable; do
        kill -0 "$ray_pid" 2> /dev/null || { wait "$ray_pid"; exit 1; }
        sleep 0.2
    done
    allocated+=(cluster.address="$HEAD_ADDRESS:$RAY_PORT")
else
    unset GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME # such a run talks to itself alone, at 127.0.0.1
fi
resume=()
if [ "$ATTEMPT" -gt 0 ]; then resume=(--requeued); fi
allocated+=(cluster.nodes="$NODES")
if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then allocated+=(cluster.gpus_per_node="$SLURM_GPUS_ON_NODE"); fi
sameroute train "${resume[@]}" "$@" "${allocated[@]}" &
driver=$!
while kill -0 "$driver" 2> /dev/null; do
    if [ -e "$ATTEMPT_FOLDER/save" ]; then
        rm "$ATTEMPT_FOLDER/save"
        kill -USR1 "$driver" 2> /dev/null || true
    fi
    sleep 0.5
done
wait "$driver" && code=0 || code=$?
echo "$code" > "$ATTEMPT_FOLDER/run_ended"
if [ -z "$SAMEROUTE_OWN_RAY" ]; then stop_ray; fi
exit "$code"
