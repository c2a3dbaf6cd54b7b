#!/usr/bin/env bash
# Trains on a Cloud TPU: creates it, starts the training on all its hosts, deletes it.
#
#     bash launch/tpu_pod.sh --name=NAME --zone=ZONE --accelerator-type=TYPE \
#         --runtime-version=VERSION [OPTIONS] --config=FILE --workdir=DIR \
#         [--config.KEY=VALUE ...]
#
#   --name=NAME              of the queued resource and of the TPU in it
#   --zone=ZONE              such as us-east5-b
#   --accelerator-type=TYPE  such as v6e-32
#   --runtime-version=V      such as v2-alpha-tpuv6e
#   --project=PROJECT        if not gcloud's default
#   --spot                   cheaper, and may be taken away: then created again
#   --setup=COMMAND          run on every host after installing: mounts the shared disk
#   --keep                   leave the TPU, and its price, when this script ends
#   --dry-run                print the commands and run none
#
# Sent is the commit that is checked out. Host 0's log is shown; each host has its own
# in ~/crossmae_jax.log. Ends when the training has ended, whatever is lost on the way.
# The TPU is deleted at the end, after an error and on Ctrl-C.
# Several hosts need your key in an agent: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail

launch=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source-path=SCRIPTDIR source=training_command.sh
source "$launch/training_command.sh"

POLL=${CROSSMAE_LAUNCH_POLL:-30} # seconds between two looks at the TPU
LOOKS=5                          # failures of gcloud or ssh in a row that are borne
name='' zone='' type='' version='' setup=''
project='' spot=false keep=false

parse() {
    local flag
    for flag; do
        case $flag in
            --name=?*) name=${flag#*=} ;;
            --zone=?*) zone=${flag#*=} ;;
            --accelerator-type=?*) type=${flag#*=} ;;
            --runtime-version=?*) version=${flag#*=} ;;
            --project=?*) project=$flag ;;
            --setup=?*) setup=${flag#*=} ;;
            --spot) spot=true ;;
            --keep) keep=true ;;
            --dry-run) DRY_RUN=true ;;
            --help | -h) print_help && exit ;;
            *) take_training_flag "$flag" ;;
        esac
    done
    [[ $name ]] || stop "--name is missing: what to call the TPU, such as --name=mae."
    [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || stop "--name=$name is not a name" \
        "for a TPU: give small letters, digits and dashes, such as --name=mae-1."
    [[ $zone ]] || stop "--zone is missing: where the TPU is, such as" \
        "--zone=us-east5-b; gcloud compute tpus locations list shows them."
    [[ $type ]] || stop "--accelerator-type is missing: which TPU, such as" \
        "--accelerator-type=v6e-32; see gcloud compute tpus accelerator-types list."
    [[ $version ]] || stop "--runtime-version is missing: the hosts' system, such as" \
        "--runtime-version=v2-alpha-tpuv6e; gcloud compute tpus tpu-vm versions list" \
        "shows them."
    check_training_flags
    check_shared_workdir
    where=("--zone=$zone")
    if [[ $project ]]; then where+=("$project"); fi
    queue=(gcloud compute tpus queued-resources)
    vm=(gcloud compute tpus tpu-vm)
    creation=("${queue[@]}" create "$name" "--node-id=$name" "${where[@]}"
        "--accelerator-type=$type" "--runtime-version=$version")
    if $spot; then creation+=(--spot); fi
    delete=("${queue[@]}" delete "$name" "${where[@]}" --force --quiet)
}

# Runs a command such that a signal to this script ends it.
child=
interruptible() {
    if $DRY_RUN; then
        show "$@"
        return
    fi
    local status=0
    "$@" &
    child=$!
    wait "$child" || status=$?
    child=
    return "$status"
}

# Prints what a list says of our TPU: a state, or nothing where there is no such thing.
listed() {
    local expected=$1 format=$2 look
    shift 2
    local command=("$@" list "${where[@]}" "--filter=name~/$name\$" "--format=$format")
    if $DRY_RUN; then
        show "${command[@]}" >&3
        echo "$expected"
        return
    fi
    for ((look = 1; look <= LOOKS; look++)); do
        if "${command[@]}"; then return; fi
        sleep "$POLL"
    done
    stop "gcloud could not list TPUs in $zone, $LOOKS times; see its message above," \
        "and gcloud auth list."
}
queue_state() { listed "$1" 'value(state.state)' "${queue[@]}"; }
node_state() { listed "$1" 'value(state)' "${vm[@]}"; }

delete_tpu() {
    local state
    if ! run "${delete[@]}"; then
        state=$(queue_state '') || state=unknown
        if [[ ! $state ]]; then return 0; fi # it was gone already
        say "$name could not be deleted, and costs money until it is. Run:"
        quoted "${delete[@]}" >&2
        return 1
    fi
}

# Ends a process and those that it started: gcloud starts ssh.
end_tree() {
    local each
    for each in $(pgrep -P "$1"); do end_tree "$each"; done
    kill "$1" 2> /dev/null || true
}

ours=false # true from when this script may have created the TPU
finish() {
    local status=$?
    $DRY_RUN || rm -f "$bundle"
    trap '' INT TERM HUP # also in gcloud: a second Ctrl-C must not stop the deletion
    trap - EXIT
    if [[ $child ]]; then end_tree "$child"; fi
    if $ours && $keep; then
        say "$name is kept, and costs money until it is deleted with"
        quoted "${delete[@]}" >&2
    elif $ours; then
        $DRY_RUN || say "deleting $name"
        delete_tpu || status=$((status ? status : 1))
    fi
    exit "$status"
}

create() {
    local state
    state=$(queue_state '') || exit
    if [[ $state ]]; then
        stop "a queued resource $name is in $zone already, in state $state; give" \
            "another --name, or delete it: $(quoted "${delete[@]}")"
    fi
    ours=true
    if ! run "${creation[@]}"; then
        state=$(queue_state '') || exit
        [[ $state ]] || ours=false
        stop "$name could not be created; gcloud's message is above. Most often it is" \
            "the quota, the zone or the name of the type."
    fi
}

# Returns whether the TPU became ready; not if it was lost first.
wait_until_active() {
    local state last=
    while true; do
        state=$(queue_state ACTIVE) || exit
        [[ $state == "$last" ]] || $DRY_RUN || say "$name is ${state:-gone}"
        last=$state
        case $state in
            ACTIVE) return ;;
            FAILED)
                "${queue[@]}" describe "$name" "${where[@]}" '--format=yaml(state)' \
                    >&2 || true
                stop "the request for $name FAILED, as said above; ask for another" \
                    "--accelerator-type or --zone, or try again later."
                ;;
            SUSPENDING | SUSPENDED | '') return 1 ;;
        esac
        interruptible sleep "$POLL"
    done
}

lost() {
    if $DRY_RUN; then return 1; fi
    # The state changes a while after the hosts are gone.
    interruptible sleep "$POLL"
    local state node
    state=$(queue_state ACTIVE) || exit
    node=$(node_state READY) || exit
    if [[ $state == ACTIVE && $node == READY ]]; then return 1; fi
    say "$name was lost: the request is ${state:-gone}, the TPU ${node:-gone}"
}

on_all_hosts() {
    interruptible "${vm[@]}" ssh "$name" "${where[@]}" --worker=all "--command=$1"
}

clone='git -c advice.detachedHead=false clone --quiet crossmae_jax.bundle crossmae_jax'
install() {
    $DRY_RUN || git -C "$launch/.." diff --quiet HEAD ||
        say "changes that are not committed are not sent to the hosts"
    run git -C "$launch/.." bundle create --quiet "$bundle" HEAD ||
        stop "git could not pack the commit that is checked out; see above."
    interruptible "${vm[@]}" scp "$bundle" "$name:crossmae_jax.bundle" "${where[@]}" \
        --worker=all || return
    on_all_hosts "rm -rf crossmae_jax && $clone" || return
    on_all_hosts 'bash crossmae_jax/launch/tpu_host.sh install' || return
    [[ ! $setup ]] || on_all_hosts "$setup"
}

number=0
start() {
    on_all_hosts \
        "bash crossmae_jax/launch/tpu_host.sh start $number $(quoted "${TRAINING[@]}")"
}
follow() {
    interruptible "${vm[@]}" ssh "$name" "${where[@]}" --worker=0 \
        '--command=bash crossmae_jax/launch/tpu_host.sh follow'
}

# Starts the training on all hosts and follows it; also where a connection breaks.
BROKEN=255 # ssh's status
train() {
    local status=0 broken=0 since
    number=$((number + 1))
    while true; do
        since=$SECONDS
        if start; then
            status=0
            follow || status=$?
            if ((status != BROKEN)); then return "$status"; fi
        fi
        if lost; then return "$BROKEN"; fi
        if ((SECONDS - since > 600)); then broken=0; fi
        if ((++broken == LOOKS)); then
            stop "the training on $name could not be followed, $LOOKS times in a row;" \
                "the message is above."
        fi
        say "no connection to $name; trying again"
    done
}

# Returns when the training has ended well, or 1 when the TPU was lost; else stops.
use_tpu() {
    local status broken=0
    wait_until_active || return 1
    until install; do
        if lost; then return 1; fi
        if ((++broken == LOOKS)); then
            stop "the hosts of $name could not be set up, $LOOKS times; see above."
        fi
    done
    while true; do
        status=0
        train || status=$?
        if ((status == 0)); then return; fi
        if ((status == BROKEN)) || lost; then return 1; fi
        if ((status != SAVED)); then
            say "the training ended with status $status; its message is above, or on" \
                "another host in ~/crossmae_jax.log (--keep leaves them)"
            exit "$status"
        fi
        say "the training ended with status 75; running the same command again"
    done
}

parse "$@"
exec 3>&1
bundle=${TMPDIR:-/tmp}/crossmae_jax-$name.bundle
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
create
until use_tpu; do
    say "deleting what is left of $name and creating it again"
    delete_tpu || exit
    ours=false
    create
done
