#!/usr/bin/env bash
# A Slurm of two nodes, n1 and n2, on this machine, for as long as a test wants it.
#
#   tests/slurm/cluster.sh up DIRECTORY             a new directory, in which everything is kept
#   tests/slurm/cluster.sh run DIRECTORY COMMAND... runs sbatch, squeue, scancel and their like on it
#   tests/slurm/cluster.sh down DIRECTORY
#
# It lives in namespaces of its own: its ports, its names in /etc/hosts and its processes are not those of the machine,
# and whatever becomes of it, all of it ends with the first process of its PID namespace.  Needs to be root.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

write_settings() {
    local host
    host=$(uname -n)
    # linear, linuxproc and none are what works without cgroups.  A job that is requeued waits until its credential has
    # expired, of which the default is two minutes.
    cat > "$1/slurm.conf" <<END
ClusterName=charlstm
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$1/munge.socket,cred_expire=5
SelectType=select/linear
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
GresTypes=gpu
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
KillWait=10
StateSaveLocation=$1/state
SlurmdSpoolDir=$1/%n
SlurmctldPidFile=$1/slurmctld.pid
SlurmdPidFile=$1/%n.pid
SlurmctldLogFile=$1/slurmctld.log
SlurmdLogFile=$1/%n.log
SlurmctldPort=6817
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=6818 CPUs=1 RealMemory=1000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=6819 CPUs=1 RealMemory=1000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
END
    # JAX asks for the first process by the name of its node.
    { cat /etc/hosts; echo "127.0.0.1 n1 n2 $host"; } > "$1/hosts"
    head -c 1024 /dev/urandom > "$1/munge.key"
    chmod 600 "$1/munge.key"
    mkdir "$1/state"
}

# The first process inside of the namespaces.
inside() {
    ip link set lo up
    ip address add 192.0.2.1/32 dev lo # where there is loopback alone, getaddrinfo finds no address to listen at
    mount --bind "$1/hosts" /etc/hosts
    # --force: the directory of a test is not open to others, which munged would have it be.
    munged --force --key-file="$1/munge.key" --socket="$1/munge.socket" --pid-file="$1/munged.pid" \
        --seed-file="$1/munged.seed" --log-file="$1/munged.log"
    export SLURM_CONF="$1/slurm.conf"
    slurmctld
    slurmd -N n1
    slurmd -N n2
    sleep infinity &
    wait # and reap what the others leave
}

run() {
    local directory=$1 first
    first=$(cat "$directory/first.pid")
    shift
    SLURM_CONF="$directory/slurm.conf" nsenter --target "$first" --mount --net --pid -- env --chdir="$PWD" "$@"
}

up() {
    local directory=$1 first
    write_settings "$directory"
    setsid unshare --mount --net --pid --mount-proc --fork --kill-child "$0" inside "$directory" \
        < /dev/null > "$directory/up.log" 2>&1 &
    echo $! > "$directory/outer.pid"
    while ((SECONDS < 30)); do
        sleep 0.2
        first=$(cat "/proc/$!/task/$!/children" 2> /dev/null || true)
        [ -n "$first" ] && echo "${first% }" > "$directory/first.pid"
        [ -n "$first" ] && [ "$(run "$directory" timeout 5 sinfo --noheader --format=%D --states=idle 2> /dev/null)" = 2 ] && return
    done
    echo "no two idle nodes in 30 seconds:" >&2
    tail -n 20 "$directory"/*.log >&2
    down "$directory"
    return 1
}

down() {
    local outer
    outer=$(cat "$1/outer.pid" 2> /dev/null) || return 0
    kill -KILL "$(cat "$1/first.pid" 2> /dev/null || echo "$outer")" 2> /dev/null || true # and with it all the others
    while kill -0 "$outer" 2> /dev/null; do sleep 0.05; done
    rm -f "$1/outer.pid" "$1/first.pid"
}

command=$1 directory=$(realpath "$2")
shift 2
"$command" "$directory" "$@"
