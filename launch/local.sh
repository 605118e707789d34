#!/bin/bash
# launch/local.sh N key=value ...     N ranks on this machine
#   launch/local.sh 2 experiment=demo/pretrain
# PYTHON names the interpreter (default: python).
set -euo pipefail
if [[ $# -lt 1 || ! $1 =~ ^[0-9]+$ ]]; then
  sed -n '2,4s/^# //p' "$0" >&2
  exit 2
fi
ranks=$1
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/env.sh"
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
  --max-restarts "${MAX_RESTARTS:-0}" -m megatron_zj.cli.train "$@"
