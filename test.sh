#!/usr/bin/env bash
# Set up an environment (default .venv; ENV=DIR for another) and run style, types and tests in it. Without arguments for
# pytest, also those tests that depend on Ray's private parts, with the oldest Ray that pyproject.toml allows.
set -euo pipefail
cd "$(dirname "$0")"
ENV=${ENV:-.venv}
[ -x "$ENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$ENV"
# uv is done in a third of pip's time; pip is for those machines on which pip alone is told where packages are.
[ -x "$ENV/bin/uv" ] || "$ENV/bin/python" -m pip install --quiet uv
"$ENV/bin/uv" pip install --quiet --python "$ENV/bin/python" --editable '.[test]' ||
  "$ENV/bin/python" -m pip install --quiet --editable '.[test]'
"$ENV/bin/ruff" check .
"$ENV/bin/ruff" format --check .
"$ENV/bin/mypy" & types=$!
"$ENV/bin/python" -m pytest -q -n "${JOBS:-2}" --dist loadfile --no-loadscope-reorder --instafail "$@"
wait "$types"
[ $# -eq 0 ] || exit 0

oldest=$(sed -n 's/.*"ray\[.*\]>=\([0-9.]*\),.*/\1/p' pyproject.toml)
own=$ENV/oldest-ray  # Ray alone is in it; all else is the environment's
place='import sysconfig; print(sysconfig.get_path("purelib"))'
"$ENV/bin/python" -m venv --without-pip "$own"
echo "import site; site.addsitedir('$("$ENV/bin/python" -c "$place")')" > "$("$own/bin/python" -c "$place")/base.pth"
"$ENV/bin/uv" pip install --quiet --python "$own/bin/python" --no-deps "ray==$oldest" ||
  "$ENV/bin/python" -m pip --python "$own/bin/python" install --quiet --no-deps "ray==$oldest"
# Files without such a test are not even imported.
grep -rlZ --include='test_*.py' 'mark\.ray_private' tests |
  xargs -0 "$own/bin/python" -m pytest -q -n "${JOBS:-2}" --instafail -m ray_private
