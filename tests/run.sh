#!/usr/bin/env bash
# Sets up what is missing and runs the tests; arguments go to pytest (`bash tests/run.sh -m slow` for the long ones).
set -euo pipefail
cd "$(dirname "$0")/.."
bash benchmarks/setup.sh dev
exec .venv/bin/python -m pytest "$@"
