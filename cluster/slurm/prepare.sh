#!/usr/bin/env bash
# Prepares a token store on Slurm: cluster/slurm/prepare.sh [RECIPE] [flags of `tinyllama prepare`], on a login node.
#
# `prepare` submits job arrays and returns; their logs are in STORE.slurm/, next to the store. The options below can also
# be in the section `data` of the recipe.
set -euo pipefail

# shellcheck source=/dev/null
source .venv/bin/activate
[[ $# -gt 0 ]] || set -- tinyllama-1.1b
tinyllama prepare "$@" --data.executor slurm \
    --data.slurm.partition "${PARTITION:-cpu}" --data.slurm.time 08:00:00 --data.slurm.memory_gigabytes 4
