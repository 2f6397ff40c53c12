#!/usr/bin/env bash
# The ahead-of-time checks under the oldest Triton this package supports:
#   bash tests/triton_oldest.sh [VENV [ARGUMENTS OF triton_aot.py]]
# VENV is made where it does not exist, beside the packages of $PYTHON: only Triton differs.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
VENV=${1:-.venv-triton-oldest}
[ $# -gt 0 ] && shift
if [ ! -x "$VENV/bin/python" ]; then
  "$PYTHON" -m venv "$VENV"
  "$VENV/bin/pip" install -q --no-deps triton==3.6.0
  site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/others.pth"
fi
"$VENV/bin/python" -c 'import triton; print("Triton", triton.__version__); assert triton.__version__.startswith("3.6.")'
exec "$VENV/bin/python" tests/triton_aot.py "$@"
