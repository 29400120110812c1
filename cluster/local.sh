#!/usr/bin/env bash
# A real Ray cluster on this machine: a head and N worker raylets, each a process tree of its own.
#
#   cluster/local.sh up [N]    start a head and N workers (2), or those of N that are dead or missing
#   cluster/local.sh status    what runs
#   cluster/local.sh down      stop it, and nothing else that runs Ray here
#
# RAYDEEP_CLUSTER_DIR       its folder: token, logs, sockets, runs (/tmp/raydeep-UID; sockets want a short path)
# RAYDEEP_CLUSTER_CPUS      logical CPUs of each worker (this machine's cores shared out, at least 2)
# RAYDEEP_STORAGE           below it lies the relative `storage` of jobs (that folder, so FOLDER/runs)
# RAY_AUTH_TOKEN_PATH       an existing token file to use instead of a generated one
set -euo pipefail

dir=${RAYDEEP_CLUSTER_DIR:-/tmp/raydeep-$(id -u)}
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

# Own processes of this cluster, and of nothing else: Ray's programs that name its folder, and by the sessions that `node`
# made, agents (ray::…), which outlive a raylet that was killed for a while, and what the dashboard forked.
processes() {
    ps -u "$(id -u)" -ww -o pid=,sess=,command= | awk -v mark="$dir/t/" -v sessions=" $(cat "$dir"/nodes/*.pid 2>/dev/null | tr '\n' ' ' || true)" '
        index($0, mark) && /\/ray\/(core|dashboard|_private|autoscaler|util)\/|bin\/ray start --block/ ||
        ($3 ~ /^ray(::|-dashboard)/ || /multiprocessing/) && index(sessions, " " $2 " ") { print $1 }' || true
}

# The node of a pid file: another process may have its number by now.
alive() { [ -f "$1" ] && ps -ww -o command= -p "$(cat "$1")" 2>/dev/null | grep -q 'ray start --block'; }

# One `up` or `down` at a time, where there is flock.
alone() {
    mkdir -p "$dir"
    if command -v flock >/dev/null; then
        exec 9>"$dir/.lock"
        flock -w 300 9 || die "another up or down works on $dir"
    fi
}

running() {
    local file
    for file in "$dir"/nodes/*.pid; do
        if alive "$file"; then return 0; fi
    done
    return 1
}

# All that descends from these processes, as PID,SESSION: jobs too, which Ray runs in sessions of their own.
below() {
    ps -u "$(id -u)" -o pid=,ppid=,sess= | awk -v roots=" $* " '
        { parent[$1] = $2; session[$1] = $3 }
        END {
            for (pid in parent)
                for (up = pid; up in parent; up = parent[up])
                    if (index(roots, " " up " ")) { print pid "," session[pid]; break }
        }'
}

# Of the cluster's processes and those below its nodes ($1) those that are left.
left() {
    processes
    ps -u "$(id -u)" -o pid=,sess=,stat= | awk -v were=" $1 " '$3 !~ /^Z/ && index(were, " " $1 "," $2 " ") { print $1 }'
}

# Wait until none is left, for so many seconds at most.
gone() {
    local end=$((SECONDS + $2))
    while [ -n "$(left "$1")" ] && [ $SECONDS -lt $end ]; do sleep 0.2; done
}

stop() {
    local file pid nodes=() were=""
    for file in "$dir"/nodes/*.pid; do
        if alive "$file"; then nodes+=("$(cat "$file")"); fi
    done
    if [ ${#nodes[@]} -gt 0 ]; then
        were=$(below "${nodes[@]}" | tr '\n' ' ')
        kill "${nodes[@]}" 2>/dev/null || true
    fi
    gone "$were" 10
    for pid in $(left "$were"); do kill -9 "$pid" 2>/dev/null || true; done
    gone "$were" 5 # killed is not gone yet
    rm -rf "$dir/nodes" "$dir/env"
}

# Between the ports that Ray gives to workers (to 19999) and those that systems give to outgoing connections (from 32768):
# either could take one before it is used.
free_ports() {
    python3 - "$1" <<'PYTHON'
import random, socket, sys
found = {}
while len(found) < int(sys.argv[1]):
    port = random.randrange(20000, 32000)
    s = socket.socket()
    try:
        s.bind(("", port))
    except OSError:
        continue
    found[port] = s
print(*found)
PYTHON
}

# node NAME ARGUMENTS...: `ray start --block` in the background; its death ends its node.
node() {
    local name=$1
    shift
    : >"$dir/nodes/$name.log" # what one before it said is not said of this one
    # In a session of its own, as Ctrl-C in this terminal is not meant for the cluster; without the files that the caller
    # has open: a pipe or a lock would be held for as long as the cluster runs.
    python3 -c 'import os, sys; os.setsid(); os.closerange(3, 1024); os.execvp(sys.argv[1], sys.argv[1:])' \
        ray start --block --disable-usage-stats "$@" >"$dir/nodes/$name.log" 2>&1 </dev/null &
    echo $! >"$dir/nodes/$name.pid"
}

own_ports() {
    local ports
    read -r -a ports <<<"$(free_ports 4)"
    echo "--dashboard-agent-listen-port ${ports[0]} --metrics-export-port ${ports[1]} --runtime-env-agent-port ${ports[2]} --dashboard-agent-grpc-port ${ports[3]}"
}

settings() {
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$dir/token}
    export RAYDEEP_STORAGE=${RAYDEEP_STORAGE:-$dir} RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
    unset RAY_ADDRESS RAY_API_SERVER_ADDRESS
    cores=$(python3 -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
    # Logical: two a worker even where there are fewer cores, or Ray Data's tasks would find no room beside training.
    cpus=${RAYDEEP_CLUSTER_CPUS:-$((workers * 2 > cores ? 2 : cores / (workers > 0 ? workers : 1)))}
    # All share one machine's memory: 30% of it for the object store of each, as Ray takes, would be too much.
    memory=$((512 * 1024 * 1024))
}

start_head() {
    umask 077 # what jobs print stands in the logs
    mkdir -p "$dir"
    chmod 700 "$dir"
    stop
    rm -rf "$dir/t"
    mkdir -p "$dir/nodes" "$dir/t"
    if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
        python3 -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH"
    fi
    chmod 600 "$RAY_AUTH_TOKEN_PATH"

    local port dash client
    read -r port dash client <<<"$(free_ports 3)"
    # The head works on no trial and trains nothing where there are workers: it runs the drivers.
    # shellcheck disable=SC2046
    node head --head --port "$port" --dashboard-host 127.0.0.1 --dashboard-port "$dash" --temp-dir "$dir/t/0" \
        --ray-client-server-port "$client" --object-store-memory $memory \
        --num-cpus $((workers > 0 ? 0 : (cores < 4 ? 4 : cores))) $(own_ports)
    started head || return 1
    cat >"$dir/env" <<ENV
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dash
export RAYDEEP_STORAGE=$RAYDEEP_STORAGE
export RAYDEEP_CLUSTER_GCS=$(grep -o -- "--address='[^']*'" "$dir/nodes/head.log" | head -n 1 | cut -d "'" -f 2)
ENV
}

start_workers() {
    local i name
    for ((i = 1; i <= workers; i++)); do
        name=worker-$i
        if alive "$dir/nodes/$name.pid"; then continue; fi
        # Temporary files of its own: two that start at once in one folder take the same names for their sockets.
        # shellcheck disable=SC2046
        node "$name" --address "$RAYDEEP_CLUSTER_GCS" --temp-dir "$dir/t/$i" --num-cpus "$cpus" \
            --object-store-memory $memory $(own_ports)
        # Ray gives a raylet 30 s to start: many at once would take longer.
        if [ $((i % 4)) -eq 0 ]; then started "$name" || return 1; fi
    done
    for ((i = 1; i <= workers; i++)); do started "worker-$i" || return 1; done
}

# Wait until a node says that it has started; 1 if it ends before, or takes too long.
started() {
    local end=$((SECONDS + 120))
    until grep -q 'Ray runtime started' "$dir/nodes/$1.log" 2>/dev/null; do
        if ! kill -0 "$(cat "$dir/nodes/$1.pid")" 2>/dev/null || [ $SECONDS -ge $end ]; then return 1; fi
        sleep 0.2
    done
}

failed() {
    echo "local.sh: $1; what its nodes said:" >&2
    tail -n 5 "$dir"/nodes/*.log >&2 || true
}

up() {
    workers=$1
    [[ $workers =~ ^(0|[1-9][0-9]{0,2})$ ]] || die "up [N]: found $workers, expected a number of workers, 0 to 999"
    # sun_path holds 107 bytes: FOLDER/t/NN/session_2026-11-30_12-02-23_346619_1234567/sockets/plasma_store
    [[ $dir = /* ]] || die "$dir: RAYDEEP_CLUSTER_DIR must be an absolute path"
    [ ${#dir} -le 36 ] || die "$dir: sockets need a path of at most 36 characters; set RAYDEEP_CLUSTER_DIR to a shorter one"
    { mkdir -p "$dir" && [ -O "$dir" ] && [ -w "$dir" ]; } 2>/dev/null || die "$dir can't be used as a folder; set RAYDEEP_CLUSTER_DIR"
    alone
    settings
    if alive "$dir/nodes/head.pid" && [ -f "$dir/env" ]; then
        # shellcheck disable=SC1091
        . "$dir/env"
        start_workers || { failed "a worker did not start"; exit 1; }
        echo "$workers workers run"
        return
    fi
    if running; then die "its head is dead, its workers are not; first: cluster/local.sh down"; fi
    trap 'stop; exit 130' INT TERM
    start_head || { failed "the head did not start"; stop; exit 1; }
    # shellcheck disable=SC1091
    . "$dir/env"
    start_workers || { failed "a worker did not start"; stop; exit 1; }
    trap - INT TERM
    cat <<SAY
A head and $workers workers of $cpus logical CPUs each. Jobs from this machine:
  . $dir/env
  raydeep submit jobs/digits.yaml
  raydeep doctor jobs/digits.yaml --address \$RAYDEEP_CLUSTER_GCS
  ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- raydeep search jobs/digits.yaml
Dashboard, from this machine only: $RAY_API_SERVER_ADDRESS
Runs:  $RAYDEEP_STORAGE/runs, unless a job names another storage
Token: $RAY_AUTH_TOKEN_PATH
Another machine, with raydeep in the same versions and that folder of runs mounted at the same path, joins with:
  mkdir -p ~/.ray && scp $(id -un)@${RAYDEEP_CLUSTER_GCS%:*}:$RAY_AUTH_TOKEN_PATH ~/.ray/auth_token && RAY_AUTH_MODE=token RAYDEEP_STORAGE=$RAYDEEP_STORAGE ray start --address=$RAYDEEP_CLUSTER_GCS
SAY
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
        alone
        stop
        echo "stopped; runs, logs and the token stay in $dir"
    else
        echo "no cluster in $dir"
    fi
    ;;
status) status ;;
*) sed -n '4,6s/^#   //p' "$0" >&2; exit 2 ;;
esac
