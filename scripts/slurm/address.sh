#!/usr/bin/env bash
# The address of this node for the others: of SAMEROUTE_INTERFACE, else of the host name, else the first there is.
set -euo pipefail
if [ -n "${SAMEROUTE_INTERFACE:-}" ]; then
    address=$(ip -4 -oneline address show dev "$SAMEROUTE_INTERFACE" | awk 'NR == 1 { split($4, a, "/"); print a[1] }') || true
else
    # a name that nobody resolves is no error yet
    address=$(getent ahostsv4 "$(hostname)" | awk '$1 !~ /^127\./ && !n++ { print $1 }') || true
    address=${address:-$(hostname -I | awk '{ print $1 }')}
fi
if [ -z "$address" ]; then
    echo "sameroute: $(hostname) has no IPv4 address${SAMEROUTE_INTERFACE:+ on $SAMEROUTE_INTERFACE}; set SAMEROUTE_INTERFACE" >&2
    exit 3
fi
echo "$address"
