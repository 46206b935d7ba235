#!/usr/bin/env bash
# Two nodes on one machine, each a set of Linux namespaces with its own address, host name, processes and shared memory;
# run by two_nodes.py as
#
#     unshare --net --uts --mount --pid --fork --kill-child --mount-proc bash two_nodes.sh PYTHON FOLDER
#
# When this script ends, for whatever reason, the kernel ends every process of both. It ends when its input closes.
set -euo pipefail
python=$1 folder=$2
here=$(cd "$(dirname "$0")" && pwd)

node() {
    hostname "node$1"
    mount -t tmpfs tmpfs /dev/shm
    ip link set lo up
    while ! ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
    ip address add "10.78.0.1$1/24" dev eth0
    ip link set eth0 up
    exec "$python" -P -m tests.support.ray_node "$1" "$folder"
}

if [ "$#" = 3 ]; then node "$3"; fi
ip link set lo up
ip link add nodes type bridge
ip link set nodes up
for number in 1 2; do
    ip link add "veth$number" type veth peer name eth0
    ip link set "veth$number" master nodes up
    unshare --net --uts --mount --pid --fork --kill-child --mount-proc \
        bash "$here/two_nodes.sh" "$python" "$folder" "$number" > "$folder/node$number.out" 2>&1 < /dev/null &
    while [ "$(readlink "/proc/$!/ns/net")" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
    ip link set eth0 netns "$!"
done
read -r _ || true
