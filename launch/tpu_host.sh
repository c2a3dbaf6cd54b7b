#!/usr/bin/env bash
# One host of a Cloud TPU: installs the library, starts the training, follows it.
# tpu_pod.sh calls this on the hosts, in the copy of the repository that it sent.
#
#     tpu_host.sh install                 a virtual environment in .venv
#     tpu_host.sh start NUMBER FLAGS...   the training, in the background
#     tpu_host.sh follow                  its log, until it ends; then its exit status
#
# A training goes on when the connection breaks. `start` with the number of the one that
# is running does nothing, so both can be given again. The log is ~/crossmae_jax.log.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
log=$HOME/crossmae_jax.log
# Held by the training for as long as it runs.
lock=$HOME/crossmae_jax.lock
state=$HOME/crossmae_jax.state

install() {
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python 3.12 .venv
    .venv/bin/python -m pip install --quiet -c constraints.txt -e '.[tpu,gcs]'
}

train() {
    local status=0
    # A shutdown signals this shell too, which must live to note the status.
    trap : TERM
    # Without the lock: loader workers may outlive the training for a moment.
    .venv/bin/python -m crossmae_jax.main "$@" 9>&- || status=$?
    echo "$status" > "$state.status"
}

start() {
    local number=$1
    shift
    exec 9>> "$lock"
    if ! flock --nonblock 9; then
        if [[ $(< "$state.number") == "$number" ]]; then return; fi
        # The host that is followed has ended; the others are about to.
        flock --timeout "${CROSSMAE_LAUNCH_WAIT:-600}" 9 || {
            echo "$(hostname): the last training did not end; look at $log" >&2
            return 1
        }
    fi
    echo "$number" > "$state.number"
    echo 255 > "$state.status"
    touch "$log"
    wc -c < "$log" > "$state.offset"
    setsid bash "$PWD/launch/tpu_host.sh" train "$@" >> "$log" 2>&1 < /dev/null &
    exec 9>&-
}

follow() {
    # Ends when it gets the lock, and tail with it.
    flock "$lock" true &
    tail -c "+$(($(< "$state.offset") + 1))" -s 0.2 "--pid=$!" -f "$log"
    return "$(< "$state.status")"
}

"$@"
