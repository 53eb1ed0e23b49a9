#!/usr/bin/env bash
# The README's comparison, AdamW against GRIT, from a bare checkout. Arguments go to
# `python -m benchmarks main`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash benchmarks/setup.sh bench
exec .venv/bin/python -m benchmarks main "$@"
