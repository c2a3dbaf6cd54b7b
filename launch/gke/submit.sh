#!/usr/bin/env bash
# Trains on one TPU slice of a GKE cluster: fills in jobset.yaml, gives it to kubectl.
#
#     bash launch/gke/submit.sh --name=NAME --image=IMAGE --claim=CLAIM \
#         --accelerator=KIND --topology=AxB [OPTIONS] --config=FILE --workdir=DIR \
#         [--config.KEY=VALUE ...]
#
#   --name=NAME            of the JobSet
#   --image=IMAGE          with the library in it: see Dockerfile
#   --claim=CLAIM          a PersistentVolumeClaim that many nodes can write
#   --mount=DIR            where the pods see it (/mnt/shared); --workdir lies below
#   --accelerator=KIND     the node pool's label, such as tpu-v6e-slice
#   --topology=AxB[xC]     likewise, such as 4x8
#   --chips-per-host=N     4, unless the machine type says another number
#   --dry-run              print the manifest and submit nothing
#
# The cluster starts the training again after it saved and after it lost a node, as
# often as it takes; after other failures three times.
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source-path=SCRIPTDIR source=../training_command.sh
source "$here/../training_command.sh"

name='' image='' claim='' mount=/mnt/shared accelerator='' topology='' chips=4
for flag; do
    case $flag in
        --name=?*) name=${flag#*=} ;;
        --image=?*) image=${flag#*=} ;;
        --claim=?*) claim=${flag#*=} ;;
        --mount=?*) mount=${flag#*=} ;;
        --accelerator=?*) accelerator=${flag#*=} ;;
        --topology=?*) topology=${flag#*=} ;;
        --chips-per-host=?*) chips=${flag#*=} ;;
        --dry-run) DRY_RUN=true ;;
        --help | -h) print_help && exit ;;
        *) take_training_flag "$flag" ;;
    esac
done

# Stops unless the value of an option ($1, $2) looks as it must ($3, such as $4).
check() {
    [[ $2 ]] || stop "--$1 is missing; give one, such as --$1=$4."
    [[ $2 =~ ^$3$ ]] || stop "--$1=$2 cannot be right; give one such as --$1=$4."
}
check name "$name" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' mae
check image "$image" '[A-Za-z0-9][A-Za-z0-9._/:@-]*' my-registry/crossmae_jax:1
check claim "$claim" '[a-z0-9]([-.a-z0-9]*[a-z0-9])?' shared
check mount "$mount" '/[A-Za-z0-9._/-]+' /mnt/shared
check accelerator "$accelerator" '[a-z0-9][-a-z0-9]*' tpu-v6e-slice
check topology "$topology" '[1-9][0-9]*x[1-9][0-9]*(x[1-9][0-9]*)?' 4x8
check chips-per-host "$chips" '[1-9][0-9]*' 4
check_training_flags
total=$((${topology//x/*}))
((total % chips == 0)) || stop "--topology=$topology has $total chips, which" \
    "--chips-per-host=$chips does not divide; give the number of one machine."

flags='' separator='['
for flag in "${TRAINING[@]}"; do
    if [[ $flag == --workdir=* && $flag != "--workdir=$mount"/* ]]; then
        stop "$flag is not below --mount=$mount, the disk that all pods share; name a" \
            "directory such as --workdir=$mount/vitb_cross."
    fi
    flag=${flag//\\/\\\\}
    flags+="$separator\"${flag//\"/\\\"}\""
    separator=', '
done

manifest=$(< "$here/jobset.yaml")
fill() { manifest=${manifest//"__$1__"/"$2"}; }
fill NAME "$name"
fill HOSTS $((total / chips))
fill ACCELERATOR "$accelerator"
fill TOPOLOGY "$topology"
fill IMAGE "$image"
fill CHIPS "$chips"
fill MOUNT "$mount"
fill CLAIM "$claim"
fill FLAGS "$flags]"

if $DRY_RUN; then
    printf '%s\n' "$manifest"
    show kubectl create --filename=-
    exit
fi
kubectl create --filename=- <<< "$manifest" ||
    stop "kubectl did not take the JobSet; see its message above. If one of this name" \
        "has ended, delete it first: kubectl delete jobset $name"
say "host 0's log: kubectl logs --follow --selector" \
    "jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
say "to end it, and save: kubectl delete jobset $name"
