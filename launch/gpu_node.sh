#!/usr/bin/env bash
# Trains on the GPUs of one machine, in one process; or of several, by ssh.
#
#     bash launch/gpu_node.sh [--gpus=N] --config=FILE --workdir=DIR \
#         [--config.KEY=VALUE ...]
#     bash launch/gpu_node.sh --nodes=HOST1,HOST2 [OPTIONS] --config=FILE ...
#
#   --gpus=N            stop unless the machine, or each, has N GPUs
#   --nodes=HOST,...    one process on each, through ssh without a password; the first is
#                       the one that the others connect to. Each has this checkout in the
#                       same directory, with its environment in .venv
#   --port=PORT         of the first host, free on it (8476)
#   --dry-run           print the commands and run none
#
# A training that saved because it was told to is started again. To end it instead, send
# SIGTERM to this script, or Ctrl-C: it saves, and the same command goes on from there.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=training_command.sh
source "$(dirname "${BASH_SOURCE[0]}")/training_command.sh"

gpus='' port=8476 nodes=()

parse() {
    local flag
    for flag; do
        case $flag in
            --gpus=?*) gpus=${flag#*=} ;;
            --nodes=?*) IFS=, read -ra nodes <<< "${flag#*=}" ;;
            --port=?*) port=${flag#*=} ;;
            --dry-run) DRY_RUN=true ;;
            --help | -h) print_help && exit ;;
            *) take_training_flag "$flag" ;;
        esac
    done
    [[ ! $gpus || $gpus =~ ^[1-9][0-9]*$ ]] ||
        stop "--gpus=$gpus is not a number of GPUs; give one, such as --gpus=8."
    [[ $port =~ ^[1-9][0-9]{0,4}$ ]] ||
        stop "--port=$port is not a port; give one that is free, such as --port=8476."
    check_training_flags
    if ((${#nodes[@]})); then
        check_shared_workdir
    else
        nodes=('')
    fi
}

# Runs a command on a machine: this one, or another by ssh.
on() {
    local node=$1
    shift
    if [[ $node ]]; then
        run ssh -o BatchMode=yes "$node" "$*"
    else
        run "$@"
    fi
}

check_gpus() {
    local node found
    [[ $gpus ]] || return 0
    for node in "${nodes[@]}"; do
        if $DRY_RUN; then
            on "$node" nvidia-smi --list-gpus
            continue
        fi
        found=$(on "$node" nvidia-smi --list-gpus) ||
            stop "nvidia-smi failed on ${node:-this machine}; is the driver installed?"
        found=$(grep -c '^GPU ' <<< "$found" || true)
        [[ $found == "$gpus" ]] || stop "${node:-this machine} has $found GPUs but" \
            "--gpus=$gpus; give --gpus=$found if that is meant, else see nvidia-smi."
    done
}

# Prints the command of one host for its shell: it notes its process, for signals.
pid_file="/tmp/crossmae_jax-$port.pid" # on the other hosts
remote_command() {
    printf 'cd %s && . .venv/bin/activate && echo $$ > %s && exec env %s' \
        "$(quoted "$PWD")" "$pid_file" "$(quoted \
            "JAX_COORDINATOR_ADDRESS=${nodes[0]#*@}:$port" \
            "JAX_NUM_PROCESSES=${#nodes[@]}" "JAX_PROCESS_ID=$1" \
            "${PROGRAM[@]}" "${TRAINING[@]}")"
}

# Starts process $1, in the background; its status goes to a file of its number.
start() {
    local node=${nodes[$1]} status=0
    if [[ $node ]]; then
        on "$node" "$(remote_command "$1")" || status=$?
        $DRY_RUN || echo "$status" > "$statuses/$1"
    elif $DRY_RUN; then
        run "${PROGRAM[@]}" "${TRAINING[@]}"
    else
        "${PROGRAM[@]}" "${TRAINING[@]}" &
        echo $! > "$statuses/pid"
        # A signal interrupts `wait`; the status is that of the last one.
        trap : TERM INT
        while true; do
            status=0
            wait $! || status=$?
            kill -0 $! 2> /dev/null || break
        done
        echo "$status" > "$statuses/0"
    fi
}

# Tells the training to save and end. One host is enough where all are well.
told_to_end=false
end_training() {
    local node
    for node in "${nodes[@]}"; do
        if [[ $node ]]; then
            ssh -o BatchMode=yes "$node" "kill \$(cat $pid_file)" || true
        elif [[ -e $statuses/pid ]]; then
            kill "$(< "$statuses/pid")" 2> /dev/null || true
        fi
    done
}

# Runs the training once on all hosts and returns its status.
train() {
    local index status ended
    rm -f "$statuses"/*
    for index in "${!nodes[@]}"; do
        start "$index" &
    done
    ended=false
    while true; do
        wait -n || true
        status=0
        for index in "${!nodes[@]}"; do
            [[ -s $statuses/$index ]] || continue
            case $(< "$statuses/$index") in
                0) ;;
                "$SAVED") ((status)) || status=$SAVED ;;
                *)
                    status=$(< "$statuses/$index")
                    say "${nodes[index]:-this machine} ended with status $status"
                    if ! $ended; then end_training; fi
                    ended=true
                    ;;
            esac
        done
        if [[ ! $(jobs -pr) ]]; then return "$status"; fi
    done
}

parse "$@"
check_gpus
if $DRY_RUN; then
    for index in "${!nodes[@]}"; do start "$index"; done
    exit
fi
statuses=$(mktemp -d)
trap 'rm -rf "$statuses"' EXIT
trap 'told_to_end=true; end_training' TERM INT HUP
status=$SAVED
while ((status == SAVED)); do
    status=0
    train || status=$?
    if $told_to_end; then break; fi
    ((status != SAVED)) || say "the training was told to save; running it again"
done
exit "$status"
