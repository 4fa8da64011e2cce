#!/usr/bin/env bash
# Serves a model by SGLang on this machine, for the trainer's rollouts, until it is ended.
#
#   launch/rollouts.sh --model=FOLDER (--preset=7b | --preset=32b | --cpu) [--servers=N] [--host=ADDRESS]
#                      [--port=N] [--router=PORT] [--workdir=FOLDER] [--addresses=FILE]
#                      [--timeout=SECONDS] [--grace=SECONDS] [--restart] [--dry-run] [-- FLAGS OF SGLang …]
#
#   --model      a checkpoint in the Hugging Face layout
#   --preset     for 8 GPUs of 80 GB: 7b starts eight servers of one GPU, 32b four of two
#   --cpu        no GPU, float32: for tests and tiny models; sets SGLang up in .cache/sglang first
#   --servers    how many; as many as the GPUs hold by default, 1 with --cpu
#   --host       where they listen and the trainer finds them; 127.0.0.1 by default
#   --port       of the first, the others follow; 30000 by default, with --cpu (or 0) free ones
#   --router     start sglang_router there too; $ROUTER_PYTHON has it, in an environment of its own
#   --workdir    gets server-N.log and server-N.pid; runs/rollouts by default
#   --addresses  the file that the trainer reads, one http://HOST:PORT a line; WORKDIR/addresses by
#                default. It appears when every server answers and always names those that do.
#   --timeout    for all servers to answer /health, in seconds; 900 by default
#   --grace      between SIGTERM and SIGKILL at the end, in seconds; 10 by default
#   --restart    start a server again that died; else it only leaves the list
#   --dry-run    print the commands and run none
#
# VTRIUNE_ROLLOUT_KEY and VTRIUNE_ROLLOUT_ADMIN_KEY, if set, are asked of clients (the trainer reads
# the same variables); they are needed unless --host is of this machine alone. SGLANG_PYTHON
# (python3) has SGLang for GPUs. Paths are relative to the repository.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source=launch/sglang_cpu/setup.sh
source launch/sglang_cpu/setup.sh

model='' preset='' servers='' host=127.0.0.1 port='' router='' workdir=runs/rollouts addresses=''
timeout=900 grace=10 cpu=false restart=false dry_run=false

while (($#)); do
  case $1 in
    --model=* | --preset=* | --servers=* | --host=* | --port=* | --router=* | --workdir=* | \
      --addresses=* | --timeout=* | --grace=*)
      flag=${1%%=*}
      printf -v "${flag#--}" %s "${1#*=}"
      ;;
    --cpu) cpu=true ;;
    --restart) restart=true ;;
    --dry-run) dry_run=true ;;
    --help | -h)
      sed -n '2,/^set /s/^# \{0,1\}//p' launch/rollouts.sh
      exit
      ;;
    --)
      shift
      break
      ;;
    *) fail "$1 is no flag of launch/rollouts.sh (--help lists them); flags of SGLang follow --" ;;
  esac
  shift
done
more=("$@")

case $($cpu && printf cpu)$preset in
  7b) gpus=1 memory=0.80 most=8 ;;
  32b) gpus=2 memory=0.85 most=4 ;;
  cpu) most=1 ;;
  *) fail "--preset=$preset: choose one of --preset=7b, --preset=32b and --cpu" ;;
esac
[[ $model ]] || fail "--model=FOLDER is missing; --help says what it is"
servers=${servers:-$most} addresses=${addresses:-$workdir/addresses}
if $cpu; then port=${port:-0}; else port=${port:-30000}; fi
for flag in servers port timeout grace router; do
  [[ ${!flag} =~ ^[0-9]*$ ]] || fail "--$flag=${!flag} is not a whole number"
done
((servers > 0)) || fail "--servers=$servers: at least one is needed"
$cpu || ((servers <= most)) || fail "--servers=$servers: 8 GPUs hold $most servers of this preset"
[[ $host != 0.0.0.0 ]] || fail "--host=0.0.0.0 is no address for the trainer; name this machine's"
[[ $host == 127.* || (${VTRIUNE_ROLLOUT_KEY:-} && ${VTRIUNE_ROLLOUT_ADMIN_KEY:-}) ]] ||
  fail "--host=$host may be reached by others: set VTRIUNE_ROLLOUT_KEY and VTRIUNE_ROLLOUT_ADMIN_KEY"
[[ ! $router || ${ROUTER_PYTHON:-} ]] ||
  fail "--router needs ROUTER_PYTHON: a Python with sglang-router==0.3.2 and without sglang"
# To print commands, a name that is no path will do: the checkpoint may be elsewhere.
[[ -f $model/config.json ]] || { $dry_run && [[ $model != [/.~]* ]]; } ||
  fail "--model=$model has no config.json: not a checkpoint"

# taken PORT: something listens there.
taken() { (: <>"/dev/tcp/$host/$1") 2>/dev/null; }

# first_taken: prints the first port of ours that is taken.
first_taken() {
  local i
  for ((i = port; i < port + servers; i++)); do
    if taken "$i"; then
      printf '%d' "$i"
      return
    fi
  done
}

if ((port == 0)); then
  port=$((20000 + RANDOM % 10000))
  while [[ $(first_taken) ]]; do port=$((20000 + RANDOM % 10000)); done
elif ! $dry_run && i=$(first_taken) && [[ $i ]]; then
  fail "port $i of $host is taken; choose another --port"
fi

# command_of I: fills `command` with what starts server I; after the servers comes the router.
command_of() {
  local i=$1
  if ((i == servers)); then
    command=("$ROUTER_PYTHON" -m sglang_router.launch_router --host "$host" --port "$router"
      --prometheus-host 127.0.0.1 --prometheus-port "$((router + 1))" --policy cache_aware
      --worker-urls)
    for ((i = 0; i < servers; i++)); do command+=("http://$host:$((port + i))"); done
    if [[ $api_key ]]; then command+=(--api-key "$api_key"); fi
    return
  fi
  # Without it a picture that comes again keeps the features of old weights.
  command=(env SGLANG_VLM_CACHE_SIZE_MB=0)
  if $cpu; then
    # More threads would wait for each other at full speed, as would servers without work.
    command+=("OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}" SGLANG_USE_CPU_ENGINE=1 HF_HUB_OFFLINE=1
      CUDA_VISIBLE_DEVICES= TORCHDYNAMO_DISABLE=1 "$sglang" launch/sglang_cpu/serve.py --device cpu
      --attention-backend torch_native --mm-attention-backend sdpa --dtype float32
      --max-total-tokens 16384 --disable-overlap-schedule --sleep-on-idle)
  else
    command+=("CUDA_VISIBLE_DEVICES=$(seq -s, $((i * gpus)) $((i * gpus + gpus - 1)))"
      "${SGLANG_PYTHON:-python3}" -m sglang.launch_server --tp-size "$gpus" --dtype bfloat16
      --attention-backend fa3 --mm-attention-backend fa3 --mem-fraction-static "$memory"
      --context-length 16384 --chunked-prefill-size 8192 --max-running-requests 128 --enable-metrics)
  fi
  command+=(--model-path "$model" --host "$host" --port "$((port + i))" --random-seed "$i"
    --weight-version step-0)
  if [[ $api_key ]]; then command+=(--api-key "$api_key"); fi
  if [[ $admin_key ]]; then command+=(--admin-api-key "$admin_key"); fi
  command+=("${more[@]}")
}

api_key=${VTRIUNE_ROLLOUT_KEY:-} admin_key=${VTRIUNE_ROLLOUT_ADMIN_KEY:-}
count=$((servers + (${router:-0} > 0)))
if $dry_run; then
  # Keys are secret: their names are printed.
  if [[ $api_key ]]; then api_key=\$VTRIUNE_ROLLOUT_KEY; fi
  if [[ $admin_key ]]; then admin_key=\$VTRIUNE_ROLLOUT_ADMIN_KEY; fi
  for ((i = 0; i < count; i++)); do
    command_of "$i"
    printf -v line '%q ' "${command[@]}"
    printf '%s\n' "${line//\\\$VTRIUNE/\$VTRIUNE}"
  done
  exit
fi

pids=() ready=() tries=()

# start I: in a process group of its own, so that its children are ended with it.
start() {
  command_of "$1"
  setsid "${command[@]}" </dev/null >"$workdir/server-$1.log" 2>&1 &
  pids[$1]=$! ready[$1]=false
  printf '%d\n' "$!" >"$workdir/server-$1.pid"
}

alive() { kill -0 "${pids[$1]}" 2>/dev/null; }

# answers I: /health of server I is 200, at once or after the token that it generates for it.
answers() {
  local at=$((port + $1)) status
  if (($1 == servers)); then at=$router; fi
  exec 3<>"/dev/tcp/$host/$at" || return
  printf 'GET /health HTTP/1.0\r\nHost: %s:%d\r\n\r\n' "$host" "$at" >&3
  read -r -t 20 _ status _ <&3 && [[ $status == 200 ]]
}

# in_background COMMAND …: in a process of its own, so that a signal to this script need not wait.
in_background() {
  "$@" 2>/dev/null &
  wait $!
}

# publish: writes the list of the servers that answer.
publish() {
  local i
  for ((i = 0; i < servers; i++)); do
    if [[ ${ready[i]} == true ]]; then printf 'http://%s:%d\n' "$host" "$((port + i))"; fi
  done >"$addresses.part"
  mv "$addresses.part" "$addresses"
}

# told I [TEXT]: the last lines of the server's log, and a line, on stderr.
told() {
  tail -n 20 "$workdir/server-$1.log" | sed "s/^/server-$1.log: /" >&2
  if [[ ${2:-} ]]; then printf '%s\n' "$2" >&2; fi
}

signal_all() {
  local pid
  for pid in "${pids[@]}"; do kill "-$1" -- "-$pid" 2>/dev/null || true; done
}

any_left() {
  local pid
  for pid in "${pids[@]}"; do if kill -0 -- "-$pid" 2>/dev/null; then return 0; fi; done
  return 1
}

# finish: neither the list nor anything that was started here outlives it.
finish() {
  local status=$? until=$((SECONDS + grace))
  trap - EXIT
  trap '' INT TERM
  rm -f "$addresses"
  # shellcheck disable=SC2046
  kill $(jobs -p) 2>/dev/null || true
  signal_all TERM
  while any_left && ((SECONDS < until)); do sleep 0.1; done
  signal_all KILL
  exit "$status"
}

# lost I: what is left of a server that ended goes too; with --restart it has three tries to return.
lost() {
  local i=$1
  kill -KILL -- "-${pids[i]}" 2>/dev/null || true
  unset "pids[i]"
  tries[i]=$((${tries[i]:-0} + 1))
  if $restart && ((tries[i] <= 3)); then
    told "$i" "server $i has ended; it is started again"
    start "$i"
  else
    told "$i" "server $i has ended; the others go on"
    ready[i]=gone
  fi
  publish
  [[ " ${ready[*]:0:servers} " =~ ' true '|' false ' ]] || fail "no server is left"
}

# await I: until it answers; nothing that was started may end meanwhile.
await() {
  local j
  until in_background answers "$1"; do
    for j in "${!pids[@]}"; do
      alive "$j" || { told "$j" && fail "server $j ended before it answered /health; its log is above"; }
    done
    ((SECONDS < timeout)) || { told "$1" &&
      fail "server $1 did not answer /health within --timeout=$timeout s; its log is above"; }
    in_background sleep 0.5
  done
  ready[$1]=true
}

if $cpu; then set_up_sglang; fi
mkdir -p "$workdir" "$(dirname "$addresses")"
rm -f "$addresses"
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
SECONDS=0
for ((i = 0; i < servers; i++)); do start "$i"; done
for ((i = 0; i < servers; i++)); do await "$i"; done
if ((count > servers)); then
  start "$servers"
  await "$servers"
  printf 'the router is http://%s:%d\n' "$host" "$router"
fi
publish
printf 'ready: %d servers answer after %d s; %s names them\n' "$servers" "$SECONDS" "$addresses"

while :; do
  in_background sleep 0.5
  for ((i = 0; i < count; i++)); do
    if [[ ${ready[i]} == gone ]]; then
      continue
    elif ! alive "$i"; then
      lost "$i"
    elif [[ ${ready[i]} == false ]] && in_background answers "$i"; then
      printf 'server %d answers again\n' "$i"
      ready[i]=true tries[i]=0
      publish
    fi
  done
done
