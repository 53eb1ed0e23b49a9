#!/usr/bin/env bash
# Sets up what is missing and runs the tests in as many processes as there are cores; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash benchmarks/setup.sh dev
exec .venv/bin/python -m pytest -n auto "$@"
