#!/bin/sh
# A SLURM controller and two nodes on this machine, for tests: slurm_cluster.sh install | start DIR | stop DIR
# Nothing outside DIR is touched but for Debian's packages; no munge, no service. SLURM_CONF=DIR/slurm.conf talks to it.
set -eu
case "$1" in
install)
  command -v slurmctld >/dev/null || apt-get install -y -qq slurmctld slurmd slurm-client
  ;;
start)
  dir=$(realpath "$2")
  mkdir -p "$dir/state" "$dir/spool"
  port=${SLURM_TEST_PORT:-17601}
  cat >"$dir/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$port
AuthType=auth/none
CredType=cred/none
SlurmUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=30
MpiDefault=none
NodeName=node1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=1
NodeName=node2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
  export SLURM_CONF="$dir/slurm.conf"
  slurmctld
  slurmd -N node1
  slurmd -N node2
  for _ in $(seq 60); do
    if [ "$(sinfo -h -o %T 2>/dev/null | sort -u)" = idle ]; then exit 0; fi
    sleep 1
  done
  echo "the nodes did not come up; see $dir/*.log" >&2
  exit 1
  ;;
stop)
  SLURM_CONF=$(realpath "$2")/slurm.conf
  export SLURM_CONF
  scancel --user="$(id -un)" || true  # a daemon that goes alone leaves its jobs
  for _ in $(seq 60); do
    if [ -z "$(squeue -h 2>/dev/null)" ]; then break; fi  # KillWait, and a save
    sleep 1
  done
  for file in "$2"/*.pid; do
    pid=$(cat "$file")
    kill "$pid"
    timeout 60 tail --pid="$pid" -f /dev/null
  done
  ;;
*)
  sed -n 2,3p "$0" >&2
  exit 2
  ;;
esac
