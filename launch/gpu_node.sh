#!/usr/bin/env bash
# Trains on the GPUs of one machine, in one process; or of several, by ssh.
#
#     bash launch/gpu_node.sh [--gpus=N] --config=FILE --workdir=DIR \
#         [--config.KEY=VALUE ...]
#     bash launch/gpu_node.sh --nodes=HOST1,HOST2 [OPTIONS] --config=FILE ...
#
#   --gpus=N            stop unless the machine, or each, has N GPUs
#   --nodes=HOST,...    one process on each, through ssh without a password; the others
#                       connect to the first
#   --directory=DIR     the checkout on each of them, with its environment in .venv (the
#                       directory in which this script is started)
#   --port=PORT         of the first host, free on it (8476)
#   --dry-run           print the commands and run none
#
# A training that saved because it was told to is started again. To end it instead, send
# SIGTERM to this script, or Ctrl-C: it saves, and the same command goes on from there.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=training_command.sh
source "$(dirname "${BASH_SOURCE[0]}")/training_command.sh"

gpus='' port=8476 directory=$PWD nodes=()

parse() {
    local flag
    for flag; do
        case $flag in
            --gpus=?*) gpus=${flag#*=} ;;
            --nodes=?*) IFS=, read -ra nodes <<< "${flag#*=}" ;;
            --directory=?*) directory=${flag#*=} ;;
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
        "$(quoted "$directory")" "$pid_file" "$(quoted \
            "JAX_COORDINATOR_ADDRESS=${nodes[0]#*@}:$port" \
            "JAX_NUM_PROCESSES=${#nodes[@]}" "JAX_PROCESS_ID=$1" \
            "${PROGRAM[@]}" "${TRAINING[@]}")"
}

told_to_end=0 # how often

# Runs the training on this machine and returns its status.
pid=
train_here() {
    local status told
    "${PROGRAM[@]}" "${TRAINING[@]}" &
    pid=$!
    if ((told_to_end)); then end_training; fi
    while true; do
        told=$told_to_end status=0
        wait "$pid" || status=$?
        # A signal to this script interrupts `wait`.
        if ((status <= 128 || told == told_to_end)); then break; fi
    done
    pid=
    return "$status"
}

# Counts the hosts that ended in `ended`, and keeps in `error` and `largest` the status
# of one that failed and the largest. Without a command substitution: bash 5.2 loses a
# signal that arrives while it reads one, and this is run again and again.
look() {
    local file status
    ended=0
    for file in "$statuses"/*; do
        if ! [[ -s $file ]] || ! read -r status < "$file"; then continue; fi
        ended=$((ended + 1))
        if ((status != 0 && status != SAVED)); then error=${error:-$status}; fi
        if ((status > largest)); then largest=$status; fi
    done
}

# Runs one process on each host and returns 0, or what the first that failed returned.
train_there() {
    local index status ended=0 error='' largest=0 told=false
    rm -f "$statuses"/*
    for index in "${!nodes[@]}"; do
        {
            status=0
            on "${nodes[index]}" "$(remote_command "$index")" || status=$?
            echo "$status" > "$statuses/$index"
        } &
    done
    while ((ended < ${#nodes[@]})); do
        sleep "${CROSSMAE_LAUNCH_POLL:-1}"
        look
        if [[ $error ]] && ! $told; then
            told=true
            say "a host ended with status $error; telling the others to end"
            end_training
        fi
    done
    return "${error:-$largest}"
}

train() {
    if [[ ${nodes[0]} ]]; then train_there; else train_here; fi
}

# Tells the training to save and end.
end_training() {
    local node
    if [[ ${nodes[0]} ]]; then
        for node in "${nodes[@]}"; do
            ssh -o BatchMode=yes "$node" "kill \$(cat $pid_file)" || true
        done
    elif [[ $pid ]]; then
        kill "$pid" 2> /dev/null || true
    fi
}

parse "$@"
check_gpus
if $DRY_RUN; then
    for index in "${!nodes[@]}"; do
        if [[ ${nodes[index]} ]]; then
            on "${nodes[index]}" "$(remote_command "$index")"
        else
            run "${PROGRAM[@]}" "${TRAINING[@]}"
        fi
    done
    exit
fi
statuses=$(mktemp -d)
trap 'rm -rf "$statuses"' EXIT
trap 'told_to_end=$((told_to_end + 1)); end_training' TERM INT HUP
status=$SAVED
while ((status == SAVED)); do
    status=0
    train || status=$?
    if ((told_to_end)); then break; fi
    ((status != SAVED)) || say "the training ended with status 75; running it again"
done
exit "$status"
