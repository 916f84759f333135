#!/bin/sh
# Usage: find_python.sh PYTHON...
# Prints the first of these Pythons that can install this project: in pyproject.toml's range, with what makes virtual
# environments. Names that are not on PATH are passed over. Where there is none, or no compiler (llama-cpp-python's build
# asks for one, so do torch.compile and Triton as they run), one line says what is missing, and the exit code is 1.
set -u

range=$(sed -n 's/^requires-python = ">=3\.\([0-9]*\),<3\.\([0-9]*\)"$/\1 \2/p' "$(dirname "$0")/../pyproject.toml")
first=${range% *} end=${range#* }
probe="
import sys
version = sys.version.split()[0]
if not (3, $first) <= sys.version_info < (3, $end):
    print('is ' + version)
else:
    try:
        import ensurepip, venv
    except ImportError:
        print('is ' + version + ' but lacks venv, Debian: apt-get install python%d.%d-venv' % sys.version_info[:2])
"

chosen='' seen=''
for python in "$@"; do
    lack=$("$python" -c "$probe" 2>/dev/null) || continue # not there, or a shim of what is not there
    if [ -z "$lack" ]; then
        chosen=$python
        break
    fi
    seen="${seen:+$seen, }$python $lack"
done

missing=''
if [ -z "$chosen" ]; then
    missing="Python 3.$first to 3.$((end - 1)) (${seen:-none of $* runs}; one elsewhere: make PYTHON=/path/to/python)"
fi
if ! command -v ${CC:-cc} >/dev/null || ! command -v ${CXX:-c++} >/dev/null; then # unquoted: may have arguments
    missing="${missing:+$missing; }a C and a C++ compiler (Debian: apt-get install build-essential)"
fi
if [ -n "$missing" ]; then
    echo "Missing: $missing" >&2
    exit 1
fi
echo "$chosen"
