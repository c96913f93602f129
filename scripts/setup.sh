# Sourced by scripts/demo and scripts/test: a Python, a virtual environment in .venv, and the system parts asked for.
# setup EXTRA PART...   installs this project with the extra into .venv and makes sure of each part: libmagic postgres promtool chromium dovecot

fail() { echo "$*" >&2; exit 1; }

find_python() {
  for candidate in "${PYTHON:-}" python3 python3.11 python3.12 python3.13 python3.14; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$candidate"; return; }
  done
  fail "Python 3.11 or newer is needed: install it, or name it with PYTHON=/path/to/python3.11"
}

have() {
  case "$1" in
    libmagic) .venv/bin/python -c 'import ctypes.util, sys; sys.exit(not ctypes.util.find_library("magic"))' ;;
    postgres) ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 ;;
    promtool) command -v promtool >/dev/null 2>&1 ;;
    chromium) [ -x /usr/bin/chromium ] ;;
    dovecot) [ -x /usr/sbin/dovecot ] && [ -x /usr/lib/dovecot/imap ] ;;
  esac
}

package_of() {
  case "$1" in libmagic) echo libmagic1 ;; postgres) echo postgresql ;; promtool) echo prometheus ;; chromium) echo chromium ;; dovecot) echo dovecot-imapd ;; esac
}

ensure_part() {
  have "$1" && return
  package=$(package_of "$1")
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing $package" >&2
    # No service of the package may start: we only need its programs.
    printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d.channel-gateway
    chmod +x /usr/sbin/policy-rc.d.channel-gateway
    export DEBIAN_FRONTEND=noninteractive
    made=0
    [ -e /usr/sbin/policy-rc.d ] || { mv /usr/sbin/policy-rc.d.channel-gateway /usr/sbin/policy-rc.d; made=1; }
    { apt-get install -y -qq --no-install-recommends "$package" || { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$package"; }; } >/dev/null 2>&1 || true
    rm -f /usr/sbin/policy-rc.d.channel-gateway
    [ "$made" = 1 ] && rm -f /usr/sbin/policy-rc.d
  fi
  have "$1" || fail "$1 is missing: install it first (Debian: apt-get install $package)"
}

setup() {
  extra=$1; shift
  python=$(find_python) || exit 1
  if [ -x .venv/bin/python ] && ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    fail ".venv holds an older Python: remove the folder .venv and run this again"
  fi
  [ -x .venv/bin/python ] || "$python" -m venv .venv || fail "python -m venv failed (Debian: apt-get install python3-venv)"
  stamp=".venv/.installed-$extra"
  wanted=$(cksum < pyproject.toml)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing the Python packages into .venv (once)" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$extra]" >&2 || fail "pip could not install the packages, see above"
    echo "$wanted" > "$stamp"
  fi
  for part in "$@"; do ensure_part "$part"; done
}
