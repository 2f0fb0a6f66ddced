#!/usr/bin/env bash
# Set up an environment (default .venv; ENV=DIR for another) and run style, types and tests in it.
set -euo pipefail
cd "$(dirname "$0")"
ENV=${ENV:-.venv}
[ -x "$ENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$ENV"
"$ENV/bin/python" -m pip install --quiet --editable '.[test]'
"$ENV/bin/ruff" check .
"$ENV/bin/ruff" format --check .
"$ENV/bin/mypy"
"$ENV/bin/python" -m pytest -q -n "${JOBS:-2}" --dist loadfile "$@"
