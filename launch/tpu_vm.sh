#!/usr/bin/env bash
# Creates a Cloud TPU VM, sets it up, trains, copies the results to a bucket and deletes the VM.
#
#   launch/tpu_vm.sh --name=NAME --zone=ZONE --type=TYPE --workdir=gs://BUCKET/FOLDER
#                    [--project=PROJECT] [--config=FILE] [--version=RUNTIME] [--mount] [--spot]
#                    [--env=FILE] [--keep] [--dry-run] [-- FLAGS OF vtriune_jax.main …]
#
#   --name      of the VM; one that exists already is used
#   --zone      for example us-east5-b
#   --type      accelerator type, such as v6e-8 (one host) or, with --mount, v6e-64 (sixteen)
#   --workdir   home of the run: fetched before training, which continues it, and written back
#               afterwards, whichever way training ended
#   --mount     mount the bucket on every worker (gcsfuse) and run right there: what several hosts
#               need, as they must see one folder; the bucket wants a hierarchical namespace, in
#               which folders are renamed at once. Not yet tried on a real pod.
#   --project   of Google Cloud; gcloud's own setting by default
#   --config    a file of this repository; configs/quickstart.py by default
#   --version   runtime of the VM; v2-alpha-tpuv6e by default, v2-alpha-tpuv5-lite for v5litepod
#   --spot      a cheaper VM that may be taken away, with what was not written back
#   --env       a file of lines NAME=VALUE for the training's environment, such as the keys of a
#               fleet of rollout servers; it is copied to every worker, for your eyes only
#   --keep      leave the VM running (and costing); it is also kept if writing back fails
#   --dry-run   print the commands and run none
#
# Example:
#
#   launch/tpu_vm.sh --name=triune --zone=us-east5-b --type=v6e-8 --workdir=gs://mine/runs/first \
#     -- --config.grpo.steps=100
#
# A pod whose rollouts come from a fleet: docs/hosts.md.
#
# Needs gcloud, signed in. Sends the last commit. Interrupted, the same command continues.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

name='' zone='' type='' workdir='' project='' env=''
config=configs/quickstart.py version=v2-alpha-tpuv6e
mount=false spot=false keep=false dry_run=false

while (($#)); do
  case $1 in
    --name=* | --zone=* | --type=* | --workdir=* | --project=* | --config=* | --version=* | \
      --env=*)
      flag=${1%%=*}
      printf -v "${flag#--}" %s "${1#*=}"
      ;;
    --mount) mount=true ;;
    --spot) spot=true ;;
    --keep) keep=true ;;
    --dry-run) dry_run=true ;;
    --help | -h)
      sed -n '2,/^set /s/^# \{0,1\}//p' launch/tpu_vm.sh
      exit
      ;;
    --)
      shift
      break
      ;;
    *) fail "$1 is no flag of launch/tpu_vm.sh (--help lists them); flags of the training follow --" ;;
  esac
  shift
done
for flag in name zone type workdir; do
  [[ ${!flag} ]] || fail "--$flag=… is missing; --help says what it is"
done
[[ $workdir == gs://?*/?* ]] || fail "--workdir=$workdir is not gs://BUCKET/FOLDER, but the VM goes away"
[[ ! $env || -r $env ]] || fail "there is no file $env that can be read, for --env"
[[ -f $config ]] || fail "there is no config file $config in this repository"

# quote WORD …: the words as a shell reads them back.
quote() {
  local word escaped="'\\''"
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      printf '%s ' "$word"
    else
      printf "'%s' " "${word//\'/$escaped}"
    fi
  done
}

# run COMMAND …: runs it, or only prints it.
run() {
  printf '%s\n' "$(quote "$@")"
  $dry_run || "$@"
}

place=("--zone=$zone" ${project:+"--project=$project"})
tpu() { run gcloud compute tpus tpu-vm "$@"; }

# on_vm SCRIPT: runs it in the repository on every worker of the VM.
on_vm() {
  tpu ssh "$name" "${place[@]}" --worker=all \
    "--command=set -euo pipefail; mkdir -p vtriune_jax; cd vtriune_jax; $1"
}

exists() {
  ! $dry_run && gcloud compute tpus tpu-vm describe "$name" "${place[@]}" >/dev/null 2>&1
}

finish() {
  local status=$?
  trap - EXIT
  if ! on_vm "$write_back"; then
    printf 'error: %s may lack what was written last, so the VM %s stays\n' "$workdir" "$name" >&2
    keep=true
  fi
  $keep || tpu delete "$name" "${place[@]}" --quiet
  exit "$status"
}

home=$(quote "$workdir")
there=$(quote "runs/${workdir#gs://}")
bucket=${workdir#gs://} bucket=${bucket%%/*}
fetch="mkdir -p $there
if gcloud storage ls $home >/dev/null 2>&1; then gcloud storage rsync --recursive $home $there; fi"
write_back="if [[ -d $there ]]; then gcloud storage rsync --recursive $there $home; fi"
if $mount; then
  keys=/usr/share/keyrings/cloud.google.gpg site=https://packages.cloud.google.com/apt
  fetch="if ! command -v gcsfuse >/dev/null; then
  curl -fsS $site/doc/apt-key.gpg | sudo gpg --dearmor --yes --output $keys
  echo \"deb [signed-by=$keys] $site gcsfuse-\$(lsb_release -cs) main\" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list
  sudo apt-get -q update
  sudo apt-get -qy install gcsfuse
fi
mkdir -p runs/$bucket
mountpoint -q runs/$bucket ||
  gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 $bucket runs/$bucket"
  write_back="if mountpoint -q runs/$bucket; then fusermount -u runs/$bucket; fi"
fi
train=$(quote "--config=$config" "--workdir=runs/${workdir#gs://}" "$@")
archive=${TMPDIR:-/tmp}/vtriune_jax-$name.tar.gz

create=(create "$name" "${place[@]}" "--accelerator-type=$type" "--version=$version")
if $spot; then create+=(--spot); fi
exists || tpu "${create[@]}"
trap finish EXIT

run git archive --format=tar.gz "--output=$archive" HEAD
tpu scp "$archive" "$name:vtriune_jax.tar.gz" "${place[@]}" --worker=all
on_vm 'tar -xzf ../vtriune_jax.tar.gz'
on_vm "sudo apt-get -q update
sudo apt-get -qy install python3.12-venv || sudo apt-get -qy install python3.11-venv
source launch/setup.sh
set_up requirements.txt
.venv/bin/python -m pip install --quiet 'jax[tpu]'"
on_vm "$fetch"
load=''
if [[ $env ]]; then
  on_vm 'install -m 600 /dev/null ../vtriune_jax.env'
  tpu scp "$env" "$name:vtriune_jax.env" "${place[@]}" --worker=all
  load='set -a; source ../vtriune_jax.env; set +a; '
fi
on_vm "${load}exec .venv/bin/python -m vtriune_jax.main $train"
