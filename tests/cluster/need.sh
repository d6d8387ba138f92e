# SPDX-License-Identifier: Apache-2.0
# To be sourced: what the checks that stand on Debian's tools have in common.

PATH=$PATH:/usr/sbin:/sbin

# need TASK COMMAND=PACKAGE...: installs what is missing; status 2, said why, where it cannot.
need() {
	local task=$1 pair missing=()
	shift
	if ((EUID != 0)); then
		echo "$0: must run as root, to $task" >&2
		exit 2
	fi
	for pair; do
		command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
	done
	if ((${#missing[@]})) && ! command -v apt-get >/dev/null; then
		echo "$0: missing and without apt-get not to be had: ${missing[*]}" >&2
		exit 2
	fi
	if ((${#missing[@]})); then
		echo "$0: installing ${missing[*]}"
		apt-get update -qq
		DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "${missing[@]}" >/dev/null
	fi
}
