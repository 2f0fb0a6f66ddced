#!/usr/bin/env bash
# Set up an environment (default .venv; ENV=DIR for another) and run the main job in it: see the README.
set -euo pipefail
cd "$(dirname "$0")"
ENV=${ENV:-.venv}
[ -x "$ENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$ENV"
"$ENV/bin/python" -m pip install --quiet --editable .
"$ENV/bin/raydmd" quickstart "$@"
