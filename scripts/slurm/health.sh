#!/usr/bin/env bash
# Whether this node can take part in a job, in a second or two, before hours are spent on it. Prints a line that begins
# with "well" or, for each thing that is wrong, "unwell", and exits with 3 where one is.
#
# It looks for: the job's shared folder, the commands, as many GPUs as were allocated, uncorrected memory errors and
# memory still in use on them, room in /dev/shm and on the node's scratch, the interface, and active RDMA ports.
set -euo pipefail

node=${SLURMD_NODENAME:-$(hostname)}
gpus=${SLURM_GPUS_ON_NODE:-0}
: "${SAMEROUTE_SCRATCH:=/tmp}" "${SAMEROUTE_MIN_SCRATCH_GB:=1}" "${SAMEROUTE_MIN_SHM_GB:=1}"
: "${SAMEROUTE_INTERFACE:=}" "${NCCL_IB_HCA:=}"
unwell=""

unwell() {
    echo "unwell $node: $*"
    unwell=yes
}

free_gb() { df --output=avail --block-size=1G "$1" | tail -n 1 | tr -d ' '; }

if [ "$(cat "${SAMEROUTE_PROBE:?}" 2> /dev/null)" != "$SLURM_JOB_ID" ]; then
    unwell "it does not see $(dirname "$SAMEROUTE_PROBE"); SAMEROUTE_ROOT and SAMEROUTE_LOGS must be on a file system of all nodes"
fi
for command in sameroute ray; do
    command -v "$command" > /dev/null || unwell "there is no command $command (make setup, or another SAMEROUTE_IMAGE)"
done
if ! mkdir -p "$SAMEROUTE_SCRATCH" 2> /dev/null || [ ! -w "$SAMEROUTE_SCRATCH" ]; then
    unwell "cannot write to SAMEROUTE_SCRATCH=$SAMEROUTE_SCRATCH"
elif [ "$(free_gb "$SAMEROUTE_SCRATCH")" -lt "$SAMEROUTE_MIN_SCRATCH_GB" ]; then
    unwell "less than $SAMEROUTE_MIN_SCRATCH_GB GB are free on $SAMEROUTE_SCRATCH"
fi
if [ "$(free_gb /dev/shm)" -lt "$SAMEROUTE_MIN_SHM_GB" ]; then
    unwell "less than $SAMEROUTE_MIN_SHM_GB GB are free in /dev/shm: files of an earlier job, or a container's limit"
fi
if [ -n "$SAMEROUTE_INTERFACE" ] && ! grep -qsE 'up|unknown' "/sys/class/net/$SAMEROUTE_INTERFACE/operstate"; then
    unwell "the interface SAMEROUTE_INTERFACE=$SAMEROUTE_INTERFACE is not there or down"
fi
for adapter in ${NCCL_IB_HCA//,/ }; do
    adapter=${adapter%%:*}
    grep -qs ACTIVE "/sys/class/infiniband/$adapter"*/ports/*/state || unwell "no port of the adapter $adapter is active"
done
if [ "$gpus" -gt 0 ]; then
    query=index,memory.used,ecc.errors.uncorrected.volatile.total
    if ! seen=$(timeout 60 nvidia-smi --query-gpu=$query --format=csv,noheader,nounits 2>&1); then
        unwell "nvidia-smi failed: $(tail -n 1 <<< "$seen")"
    else
        found=$(wc -l <<< "$seen")
        [ "$found" -ge "$gpus" ] || unwell "it has $found GPUs of $gpus"
        while IFS=', ' read -r index used errors; do
            [ "$used" -lt 2000 ] || unwell "GPU $index has $used MiB in use, by a process that is not this job's"
            [[ ! $errors =~ ^[1-9] ]] || unwell "GPU $index counts $errors uncorrected memory errors"
        done <<< "$seen"
    fi
fi
[ -z "$unwell" ] || exit 3
echo "well $node: $gpus GPUs, $(free_gb "$SAMEROUTE_SCRATCH") GB scratch, $(free_gb /dev/shm) GB shared memory"
