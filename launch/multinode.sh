#!/bin/bash
# launch/multinode.sh NODES RANKS_PER_NODE HEAD:PORT key=value ...     the same line on every node
#   launch/multinode.sh 2 8 node0:29400 experiment=zhongjing/pretrain world_size=16
# Variables: PYTHON interpreter (python); MAX_RESTARTS of dead workers (3); RUN_ID, one for the whole run (zj);
#   LOCAL_ADDR, the address by which the others reach this node (needed where the host name resolves to 127.0.0.1);
#   WAIT_SECONDS, how long nodes wait for one that is missing (1800).
# A worker or a node that dies is waited for and training goes on from the newest checkpoint; the head node holds the
# meeting point, so when that one dies the run has to be started again (it resumes too).
set -euo pipefail
if [[ $# -lt 3 || ! $1 =~ ^[0-9]+$ || ! $2 =~ ^[0-9]+$ || $3 != *:* ]]; then
  sed -n '2,8s/^# //p' "$0" >&2
  exit 2
fi
nodes=$1 ranks=$2 head=$3
shift 3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/env.sh"
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$ranks" \
  --max-restarts "${MAX_RESTARTS:-3}" --rdzv-backend c10d --rdzv-id "${RUN_ID:-zj}" --rdzv-endpoint "$head" \
  --rdzv-conf "join_timeout=${WAIT_SECONDS:-1800}" \
  ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} -m megatron_zj.cli.train "$@"
