#!/usr/bin/env bash
# One node of cluster.sh, in namespaces of its own.
set -euo pipefail
folder=$1 name=$2 address=$3
hostname "$name"
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs "$folder/scratch"
ip link set lo up
while ! ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
ip address add "$address/24" dev eth0
ip link set eth0 up
export SLURM_CONF="$folder/slurm.conf"
slurmd -D -f "$SLURM_CONF" &
wait
