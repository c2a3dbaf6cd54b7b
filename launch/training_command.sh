# shellcheck shell=bash
# The command that every launcher starts on every host. The launchers source this file.

# shellcheck disable=SC2034  # The launchers use both.
{
    PROGRAM=(python -m crossmae_jax.main)
    SAVED=75 # the training's exit status for "saved; run the same command again"
}
TRAINING=()
DRY_RUN=false

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

stop() {
    say "$*"
    exit 2
}

# Prints the comment at the top of a launcher: its help.
print_help() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0"; }

# Prints words such that a shell reads the same words again.
quoted() {
    local word words=()
    for word; do
        if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]]; then
            word="'${word//\'/\'\\\'\'}'"
        fi
        words+=("$word")
    done
    printf '%s\n' "${words[*]}"
}

# Prints a command, in lines of 88 columns where its words allow that.
show() {
    local word line=''
    for word; do
        word=$(quoted "$word")
        if [[ $line ]] && ((${#line} + ${#word} > 85)); then
            printf '%s \\\n' "$line"
            line='   '
        fi
        line+=${line:+ }$word
    done
    printf '%s\n' "$line"
}

# Runs a command, or in a dry run shows it.
run() {
    if $DRY_RUN; then show "$@"; else "$@"; fi
}

# Takes a flag that is not the launcher's own: one of the training's, or a mistake.
take_training_flag() {
    case $1 in
        --config=?* | --workdir=?* | --config.?*=* | --noconfig.?* | \
            --heartbeat_seconds=?* | --resume=?* | \
            --deterministic | --nodeterministic) TRAINING+=("$1") ;;
        *)
            stop "$1 is neither an option of this script nor a flag of the training" \
                "(--config=FILE, --workdir=DIR, --config.KEY=VALUE); see --help."
            ;;
    esac
}

# Stops unless the training's two required flags were given and can work everywhere.
check_training_flags() {
    local flag config='' workdir=''
    # bash 4.3 and older take an empty array for an unset one.
    for flag in ${TRAINING[@]+"${TRAINING[@]}"}; do
        case $flag in
            --config=*) config=${flag#*=} ;;
            --workdir=*) workdir=${flag#*=} ;;
        esac
    done
    [[ $config ]] || stop "--config is missing: the file that describes the" \
        "experiment, such as --config=configs/vitb_cross.py."
    [[ $workdir ]] || stop "--workdir is missing: the directory of this run, on a" \
        "disk that all hosts share, such as --workdir=/mnt/shared/vitb_cross."
}

# Stops unless the workdir means the same on every host.
check_shared_workdir() {
    local flag
    for flag in "${TRAINING[@]}"; do
        if [[ $flag == --workdir=* && $flag != --workdir=/* &&
            $flag != --workdir=gs://* ]]; then
            stop "$flag is not an absolute path; name a directory on a disk that" \
                "all hosts have mounted, such as --workdir=/mnt/shared/vitb_cross, or" \
                "in a bucket, such as --workdir=gs://BUCKET/vitb_cross."
        fi
    done
}
