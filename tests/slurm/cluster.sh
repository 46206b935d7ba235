#!/usr/bin/env bash
# A Slurm cluster of two nodes on one machine, for tests; run by cluster.py as
#
#     unshare --net --uts --mount --pid --fork --kill-child --mount-proc bash cluster.sh FOLDER
#
# Each node is a set of Linux namespaces: its own host name, address, loopback, processes and shared memory. This script
# is the first process of the outer set, so when it ends, for whatever reason, the kernel ends every process and removes
# every interface of the cluster. It ends when its standard input closes.
set -euo pipefail
folder=$1
here=$(cd "$(dirname "$0")" && pwd)

hostname control
ip link set lo up
ip link add cluster0 type bridge
ip address add 10.77.0.1/24 dev cluster0
ip link set cluster0 up

head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 400 "$folder/munge.key"
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munge.pid" \
    --seed-file="$folder/munge.seed" --log-file="$folder/munge.log"
slurmctld -f "$folder/slurm.conf"

for number in 1 2; do
    ip link add "veth$number" type veth peer name eth0
    ip link set "veth$number" master cluster0 up
    unshare --net --uts --mount --pid --fork --kill-child --mount-proc \
        bash "$here/node.sh" "$folder" "node$number" "10.77.0.1$number" > "$folder/node$number.out" 2>&1 &
    while [ "$(readlink "/proc/$!/ns/net")" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
    ip link set eth0 netns "$!"
done
read -r _ || true  # until the test closes it
