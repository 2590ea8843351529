# Sourced by the other scripts: makes or reuses this checkout's virtual environment and sets $VENV and $ROOT.
#
#   . scripts/_env.sh           what the packages need
#   . scripts/_env.sh dev       that and the tools of the tests
#
# MM_CB_VENV chooses another folder than .venv, PYTHON another interpreter (3.11 or newer), MM_CB_CONSTRAINTS another file
# of versions than constraints.txt (the oldest ones allowed, for example). Whatever pip is configured
# to prefer (a CPU build of torch, a mirror) is respected. A stamp holds the hash of what was installed: while it fits,
# nothing is installed and the network is not touched. An installation that was cut off is started anew.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${MM_CB_VENV:-$ROOT/.venv}"
case "$VENV" in /*) ;; *) VENV="$PWD/$VENV" ;; esac
CONSTRAINTS="${MM_CB_CONSTRAINTS:-$ROOT/constraints.txt}"
case "$CONSTRAINTS" in /*) ;; *) CONSTRAINTS="$PWD/$CONSTRAINTS" ;; esac
unset PYTHONPATH PYTHONHOME # another installation's packages would stand before ours
# Packages are installed uncompiled, and what is imported is compiled once. Where an image of a container forbids to keep
# that, every process would compile torch and transformers anew: 18 seconds instead of 8 until a command begins.
unset PYTHONDONTWRITEBYTECODE

_mm_cb_fail() {
    echo "$1" >&2
    exit 2
}

_mm_cb_is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

_mm_cb_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then # a named one is used or refused, never replaced in silence
        _mm_cb_is_new_enough "$PYTHON" || _mm_cb_fail "\`PYTHON\` must name a Python 3.11 or newer, got: $PYTHON"
        command -v "$PYTHON"
        return
    fi
    for candidate in python3.13 python3.12 python3.11 python3 python; do
        if _mm_cb_is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    _mm_cb_fail "Python 3.11 or newer is needed and none was found; install it, or name it: PYTHON=/path/to/python3 bash $0"
}

_mm_cb_hash() {
    "$VENV/bin/python" - "$ROOT" "$VENV" "$1" "$CONSTRAINTS" <<'PYTHON'
import hashlib, pathlib, sys
root, venv, extra, constraints = sys.argv[1:]
digest = hashlib.sha256("\0".join([root, venv, extra, sys.version]).encode())
for path in (pathlib.Path(root, "pyproject.toml"), pathlib.Path(constraints)):
    digest.update(path.read_bytes())
print(digest.hexdigest())
PYTHON
}

_mm_cb_is_current() { # does a stamp say that at least this much was installed to its end?
    [ -x "$VENV/bin/python" ] && [ ! -e "$VENV/.mm-cb-unfinished" ] || return 1
    local level
    for level in "$@"; do
        if [ "$(cat "$VENV/.mm-cb-$level" 2>/dev/null)" = "$(_mm_cb_hash "$level")" ]; then return 0; fi
    done
    return 1
}

_mm_cb_make_venv() {
    local python
    if [ -e "$VENV/.mm-cb-made" ]; then rm -rf "$VENV"; fi
    python="$(_mm_cb_python)" || exit 2
    mkdir -p "$VENV" && touch "$VENV/.mm-cb-made" "$VENV/.mm-cb-unfinished" ||
        _mm_cb_fail "$VENV cannot be written; set MM_CB_VENV to a folder that can."
    "$python" -m venv "$VENV" ||
        _mm_cb_fail "$python cannot make virtual environments; install its venv package (on Debian: python3-venv)."
}

_mm_cb_pip() {
    local quiet="-q"
    if [ -t 1 ]; then quiet=""; fi
    PIP_USER=0 "$VENV/bin/python" -m pip install $quiet --no-compile -c "$CONSTRAINTS" "$@"
}

_mm_cb_install() {
    local level="$1" target="$ROOT"
    if [ "$level" = dev ]; then target="$ROOT[dev]"; fi
    echo "Installing into $VENV (once; one to three minutes beside a good connection) ..."
    # A folder that we made and did not finish is made anew; one that somebody else made is only added to.
    if [ ! -x "$VENV/bin/python" ] || { [ -e "$VENV/.mm-cb-made" ] && [ -e "$VENV/.mm-cb-unfinished" ]; }; then
        _mm_cb_make_venv
    fi
    rm -f "$VENV/.mm-cb-core" "$VENV/.mm-cb-dev"
    touch "$VENV/.mm-cb-unfinished" &&
        _mm_cb_pip hatchling editables &&
        _mm_cb_pip --no-build-isolation -e "$target" &&
        _mm_cb_hash "$level" >"$VENV/.mm-cb-$level" &&
        rm -f "$VENV/.mm-cb-unfinished" ||
        _mm_cb_fail "The installation did not come to its end; its last lines say why. Start the same command again to retry."
}

_mm_cb_ensure() {
    local level="$1"
    shift
    if _mm_cb_is_current "$@"; then return; fi
    mkdir -p "$VENV" 2>/dev/null && [ -w "$VENV" ] || _mm_cb_fail "$VENV cannot be written; set MM_CB_VENV to a folder that can."
    (
        if command -v flock >/dev/null && exec 9>"$VENV.lock"; then flock 9; fi # two scripts at once: one installs, one waits
        if ! _mm_cb_is_current "$@"; then _mm_cb_install "$level" 9>&-; fi
    ) || exit $?
}

[ -r "$CONSTRAINTS" ] || _mm_cb_fail "\`MM_CB_CONSTRAINTS\` must name a file of versions that pip takes, got: $CONSTRAINTS"
case "${1:-core}" in
core) _mm_cb_ensure core core dev ;; # what the tests need includes what the packages need
dev) _mm_cb_ensure dev dev ;;
*) _mm_cb_fail "scripts/_env.sh takes nothing or dev, got: $1" ;;
esac
