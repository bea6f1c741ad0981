#!/usr/bin/env bash
# Tokenises on Slurm: cluster/slurm/prepare.sh [RECIPE] [flags of `tinyllama prepare`], on a login node.
#
# `prepare` submits the job arrays by itself and returns; their logs lie beside the store, in STORE.slurm/. The same
# flags may stand in the recipe, under `data`.
set -euo pipefail

# shellcheck source=/dev/null
source .venv/bin/activate
[[ $# -gt 0 ]] || set -- tinyllama-1.1b
tinyllama prepare "$@" --data.executor slurm \
    --data.slurm.partition "${PARTITION:-cpu}" --data.slurm.time 08:00:00 --data.slurm.memory_gigabytes 4
