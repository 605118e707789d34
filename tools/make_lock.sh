#!/bin/bash
# make_lock.sh FILE: the exact versions that a fresh install takes today.  torch and Triton are chosen, the rest follows.
set -euo pipefail
lock=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "triton==3.7.1" "megatron-core==0.16.1" "setuptools>=77" ".[hf,gpu,dev]"
{
  grep '^#' "$lock"
  "$folder/venv/bin/pip" freeze --all | grep -Ev '^(pip|nvidia-.*|cuda-.*)==|^megatron-zj' | sed -E 's/\+(cpu|cu[0-9]+)$//' | sort -f
} >"$folder/lock"
mv "$folder/lock" "$lock"
