#!/bin/bash
# Two machines on one: two_hosts.sh COMMAND runs COMMAND on "hosta" (10.77.0.1) and on "hostb" (10.77.0.2), each with its own
# network, host name and process numbers, joined by a cable (veth). NODE is 0 and 1, PEER the other's address. Needs user
# namespaces, nothing else: it is called as  unshare --user --map-root-user --net --uts --mount bash two_hosts.sh COMMAND
# Exit code: hosta's, or hostb's when hosta's is 0.
set -u
if [ "${NODE:-}" = 1 ]; then
    hostname hostb
    mount -t proc proc /proc
    for _ in $(seq 100); do ip link show vb >/dev/null 2>&1 && break; sleep 0.1; done
    ip link set lo up && ip addr add 10.77.0.2/24 dev vb && ip link set vb up || exit 77
    export GLOO_SOCKET_IFNAME=vb PEER=10.77.0.1
    exec bash -c "$1"
fi
hostname hosta            # its address stays when the cable is pulled: it is lo's too
names=$(mktemp)
printf '127.0.0.1 localhost\n10.77.0.1 hosta\n10.77.0.2 hostb\n' > "$names"
mount --bind "$names" /etc/hosts || exit 77
ip link set lo up && ip addr add 10.77.0.1/32 dev lo && ip link add va type veth peer name vb || exit 77
NODE=1 unshare --net --uts --mount --pid --fork --kill-child bash "$0" "$1" &
other=$!
for _ in $(seq 100); do
    [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ] && break
    sleep 0.1
done
ip link set vb netns $other && ip addr add 10.77.0.1/24 dev va && ip link set va up || exit 77
NODE=0 GLOO_SOCKET_IFNAME=va PEER=10.77.0.2 bash -c "$1"
code=$?
wait $other
there=$?
rm -f "$names"
echo "hosta: $code, hostb: $there" >&2
[ $code != 0 ] && exit $code
exit $there
