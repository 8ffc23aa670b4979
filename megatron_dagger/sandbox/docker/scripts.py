"""The bash scripts that a Docker sandbox runs in its container; each starts in the work tree's root.

The files they use lie in ``/.sandbox``. No process of the agent runs beside them, so what they check
is still so when they act on it.
"""

from __future__ import annotations

from megatron_dagger.envs.base import EnvironmentBroken

_LEADS_OUT, _MISSING, _IS_DIRECTORY = 81, 82, 83

# The agent's command comes on stdin; directory, exported variables and functions outlive it. They are put in place
# whole: a command that is cut short may be killed while they are written.
RUN = r"""
IFS= read -r -d ''
set -- "$REPLY" # no variable of the agent has the name of this one
exec < /dev/null
[ -d /.sandbox ] || mkdir /.sandbox 2> /dev/null
[ -r /.sandbox/state ] && . /.sandbox/state 2> /dev/null
trap '{ set +x; { declare -f; declare -px; printf "cd -- %q\n" "$PWD"; } > /.sandbox/new &&
    builtin command -p mv -fT /.sandbox/new /.sandbox/state; } 2> /dev/null' EXIT
eval "$1"
"""

_INSIDE = rf"""
root=$(realpath .)
inside() {{ # a path whose links lead out of the work tree ends the script
    case $(realpath -m -- "$1")/ in "$root"/*) ;; *) echo "$2"; exit {_LEADS_OUT} ;; esac
}}
"""

# Names, one a line: their parents must lie in the work tree; whatever stands there is removed.
CLEAR = f"""{_INSIDE}
mapfile -t names
for name in "${{names[@]}}"; do inside "$(dirname -- "$name")" "$name"; done
rm -f -- "${{names[@]}}"
"""

UNPACK = "tar -x --no-same-owner -f -"

# A folder's name; the archive of the regular files below it.
PACK = f"""{_INSIDE}
folder=$(cat)
inside "$folder" "$folder"
find "$folder" \\( -name .git -o -name __pycache__ \\) -prune -o -type f -print0 2> /dev/null |
    tar -c -f - --null --no-recursion --hard-dereference --verbatim-files-from -T - 2> /dev/null
"""

# How many bytes, and a path.
READ = f"""
read -r bytes path
[ -d "$path" ] && exit {_IS_DIRECTORY}
[ -f "$path" ] || exit {_MISSING}
head -c "$bytes" -- "$path"
"""

# A path on a line, then the content.
WRITE = f"""
IFS= read -r path
[ -d "$path" ] && exit {_IS_DIRECTORY}
mkdir -p -- "$(dirname -- "$path")" && cat > "$path"
"""


def failure(exit_code: int, output: str) -> Exception:
    """What a transfer script's exit code means."""
    if exit_code == _LEADS_OUT:
        return EnvironmentBroken(f"{output!r} leads out of the work tree")
    if exit_code == _MISSING:
        return FileNotFoundError("there is no such file")
    if exit_code == _IS_DIRECTORY:
        return IsADirectoryError("it is a directory")
    return EnvironmentBroken(f"files could not be moved: exit code {exit_code} {output[-300:]}".rstrip())
