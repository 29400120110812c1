#!/usr/bin/env bash
# A real Ray cluster on this machine: a head and N worker raylets, each a process tree of its own.
#
#   cluster/local.sh up [N]    start a head and N workers (2), print how to use them
#   cluster/local.sh status    what runs
#   cluster/local.sh down      stop it, and nothing else that runs Ray here
#
# RAYDEEP_CLUSTER_DIR       its folder: token, logs, sockets, runs (/tmp/raydeep-UID; sockets want a short path)
# RAYDEEP_CLUSTER_CPUS      logical CPUs of each worker (this machine's cores shared out, at least 2)
# RAYDEEP_STORAGE           below it lies the relative `storage` of jobs (that folder, so FOLDER/runs)
# RAY_AUTH_TOKEN_PATH       an existing token file to use instead of a generated one
set -Eeuo pipefail

dir=${RAYDEEP_CLUSTER_DIR:-${TMPDIR:-/tmp}/raydeep-$(id -u)}
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() { echo "local.sh: $*" >&2; exit 2; }

# The environment that all nodes and jobs run in: the active one, else the checkout's, else what is on the path.
for bin in "${VIRTUAL_ENV:-/nonexistent}/bin" "$repo/.venv/bin"; do
    if [ -x "$bin/ray" ]; then
        PATH=$bin:$PATH
        break
    fi
done
command -v ray >/dev/null || die "no ray on the path: activate the environment that raydeep is installed in"

# Processes of this cluster by their command lines: raylets, GCS, dashboard and agents all name its folder; Ray's
# workers end with their raylet.
processes() { ps -eww -o pid=,command= | awk -v mark="$dir/t/" -v self=$$ 'index($0, mark) && $1 != self && !/awk/ { print $1 }'; }

alive() { [ -f "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

running() {
    local file
    for file in "$dir"/nodes/*.pid; do
        if alive "$file"; then return 0; fi
    done
    return 1
}

stop() {
    local file pid end
    for file in "$dir"/nodes/*.pid; do
        if alive "$file"; then kill "$(cat "$file")" 2>/dev/null || true; fi
    done
    end=$((SECONDS + 10))
    while [ -n "$(processes)" ] && [ $SECONDS -lt $end ]; do sleep 0.2; done
    for pid in $(processes); do kill -9 "$pid" 2>/dev/null || true; done
    rm -rf "$dir/nodes" "$dir/env"
}

free_ports() {
    python3 - "$1" <<'PYTHON'
import socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for s in sockets:
    s.bind(("", 0))
print(*(s.getsockname()[1] for s in sockets))
PYTHON
}

# node NAME ARGUMENTS...: `ray start --block` in the background; its death ends its node.
node() {
    local name=$1
    shift
    # In a session of its own, as Ctrl-C in this terminal is not meant for the cluster; without the files that the caller
    # has open: a pipe or a lock would be held for as long as the cluster runs.
    python3 -c 'import os, sys; os.setsid(); os.closerange(3, 1024); os.execvp(sys.argv[1], sys.argv[1:])' \
        ray start --block --disable-usage-stats "$@" >"$dir/nodes/$name.log" 2>&1 </dev/null &
    echo $! >"$dir/nodes/$name.pid"
}

up() {
    local workers=${1:-2} cores cpus port dash client agents i end seen
    [[ $workers =~ ^[0-9]+$ ]] || die "up [N]: found $workers, expected a number of workers"
    # sun_path holds 107 bytes: FOLDER/t/NN/session_2026-11-30_12-02-23_346619_1234567/sockets/plasma_store
    [ ${#dir} -le 36 ] || die "$dir: sockets need a path of at most 36 characters; set RAYDEEP_CLUSTER_DIR to a shorter one"
    if running; then die "it runs already (see: cluster/local.sh status); stop it first: cluster/local.sh down"; fi

    umask 077
    mkdir -p "$dir"
    [ -O "$dir" ] || die "$dir belongs to another user; set RAYDEEP_CLUSTER_DIR"
    chmod 700 "$dir" # what jobs print stands in its logs
    stop
    rm -rf "$dir/t"
    mkdir -p "$dir/nodes" "$dir/t"
    local token=${RAY_AUTH_TOKEN_PATH:-$dir/token}
    if [ ! -s "$token" ]; then
        python3 -c 'import secrets; print(secrets.token_hex(32), end="")' >"$token"
    fi
    chmod 600 "$token"

    cores=$(python3 -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
    # Logical: two a worker even where there are fewer cores, or Ray Data's tasks would find no room beside training.
    cpus=${RAYDEEP_CLUSTER_CPUS:-$((workers * 2 > cores ? 2 : cores / (workers > 0 ? workers : 1)))}
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
    export RAYDEEP_STORAGE=${RAYDEEP_STORAGE:-$dir}
    unset RAY_ADDRESS RAY_API_SERVER_ADDRESS
    # Each of N shares one machine's memory: 30% for the object store of each, as Ray takes, would be more than all.
    local memory=$((512 * 1024 * 1024))

    trap 'echo "local.sh: the cluster did not start; what it said:" >&2; tail -n 5 "$dir"/nodes/*.log >&2; stop; exit 1' ERR INT TERM
    read -r port dash client agents <<<"$(free_ports $((3 + 4 * (workers + 1))))"
    # shellcheck disable=SC2206
    agents=($agents)
    local own
    own() { echo "--dashboard-agent-listen-port ${agents[$1]} --metrics-export-port ${agents[$1 + 1]} --runtime-env-agent-port ${agents[$1 + 2]} --dashboard-agent-grpc-port ${agents[$1 + 3]}"; }
    # The head works on no trial and trains nothing where there are workers: it runs the drivers.
    # shellcheck disable=SC2046
    node head --head --port "$port" --dashboard-host 127.0.0.1 --dashboard-port "$dash" --temp-dir "$dir/t/0" \
        --ray-client-server-port "$client" --object-store-memory $memory \
        --num-cpus $((workers > 0 ? 0 : (cores < 4 ? 4 : cores))) $(own 0)
    end=$((SECONDS + 90))
    until grep -q -- '--address=' "$dir/nodes/head.log" 2>/dev/null; do
        alive "$dir/nodes/head.pid" && [ $SECONDS -lt $end ] || false
        sleep 0.2
    done
    local gcs
    gcs=$(grep -o -- "--address='[^']*'" "$dir/nodes/head.log" | head -n 1 | cut -d "'" -f 2)
    for ((i = 1; i <= workers; i++)); do
        # Temporary files of its own: two that start at once in one folder take the same names for their sockets.
        # shellcheck disable=SC2046
        node "worker-$i" --address "$gcs" --temp-dir "$dir/t/$i" --num-cpus "$cpus" --object-store-memory $memory \
            $(own $((4 * i)))
    done
    cat >"$dir/env" <<ENV
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$token
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dash
export RAYDEEP_CLUSTER_GCS=$gcs
ENV
    end=$((SECONDS + 120))
    until seen=$(count "$gcs") && [ "$seen" -eq $((workers + 1)) ]; do
        for ((i = 1; i <= workers; i++)); do alive "$dir/nodes/worker-$i.pid"; done
        [ $SECONDS -lt $end ] || false
        sleep 0.5
    done
    trap - ERR INT TERM
    cat <<SAY
A head and $workers workers of $cpus logical CPUs each. Jobs from this machine:
  . $dir/env
  raydeep submit jobs/digits.yaml
  ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- raydeep search jobs/digits.yaml
Dashboard, from this machine only: http://127.0.0.1:$dash
Runs:  $RAYDEEP_STORAGE/runs, unless a job names another storage
Token: $token
Another machine, with raydeep in the same versions and that folder of runs mounted at the same path, joins with:
  mkdir -p ~/.ray && scp $(id -un)@${gcs%:*}:$token ~/.ray/auth_token && RAY_AUTH_MODE=token RAYDEEP_STORAGE=$RAYDEEP_STORAGE ray start --address=$gcs
SAY
}

# Raylets that the GCS counts as alive.
count() {
    python3 - "$1" 2>/dev/null <<'PYTHON'
import sys
from ray._raylet import GcsClient
print(sum(node.state == 0 for node in GcsClient(address=sys.argv[1]).get_all_node_info().values()))
PYTHON
}

status() {
    if [ ! -d "$dir/nodes" ]; then
        echo "no cluster in $dir; start one: cluster/local.sh up"
        return 1
    fi
    local file
    for file in "$dir"/nodes/*.pid; do
        printf '%-10s %s\n' "$(basename "$file" .pid)" "$(alive "$file" && echo "runs, process $(cat "$file")" || echo "is dead; see ${file%.pid}.log")"
    done
    # shellcheck disable=SC1091
    if alive "$dir/nodes/head.pid" && [ -f "$dir/env" ]; then
        . "$dir/env"
        echo "jobs       $RAY_API_SERVER_ADDRESS (after: . $dir/env)"
        ray status --address "$RAYDEEP_CLUSTER_GCS" 2>/dev/null | sed -n '/^Resources/,$p'
    fi
}

case ${1:-} in
up) up "${2:-2}" ;;
down)
    if [ -d "$dir/nodes" ]; then
        stop
        echo "stopped; runs, logs and the token stay in $dir"
    else
        echo "no cluster in $dir"
    fi
    ;;
status) status ;;
*) sed -n '4,6s/^#   //p' "$0" >&2; exit 2 ;;
esac
