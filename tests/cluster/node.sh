#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# First process of a host of two_hosts.sh, in namespaces of its own: node.sh NAME ADDRESS FOLDER
set -euo pipefail
name=$1 address=$2 folder=$3

hostname "$name"
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/ssh_config" /etc/ssh/ssh_config
ip link set lo up
until ip link show eth0 &>/dev/null; do sleep 0.1; done # two_hosts.sh plugs the cable in
ip address add "$address/24" dev eth0
ip link set eth0 up
exec /usr/sbin/sshd -D -e -f "$folder/sshd_config"
