#!/bin/sh
# Install Chromium, in which tests/test_browser.py opens the report, where there is none and apt and
# root are; else say what is missing, and those tests will fail with the same words.
set -eu
cd "$(dirname "$0")/.."
is_there() {
    .venv/bin/python -c 'import sys; sys.path.insert(0, "tests"); import browser; browser.chromium()' 2>/dev/null
}
if is_there; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "install: Chromium for the tests of the report, with apt-get" >&2
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -qq -y chromium fonts-dejavu-core; } >/dev/null 2>&1 || true
fi
is_there || echo "install: expected Chromium for the tests of the report, found none: apt-get install chromium, or set CHROMIUM to one" >&2
