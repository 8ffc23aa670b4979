"""The bash scripts that a DockerSandbox runs in its container; each starts in the root of the work tree.

Their own files are in ``/.sandbox``. No process of the agent runs at the same time, so a checked path cannot change
before it is used.
"""

from __future__ import annotations

from megatron_dagger.sandbox import file_scripts
from megatron_dagger.sandbox.base import EnvironmentBroken

_LEADS_OUT = 81

# stdin: the agent's command. Its directory, exported variables and functions are saved for the next command, by an
# atomic rename, because the command may be killed while they are written.
RUN = r"""
IFS= read -r -d ''
set -- "$REPLY" # a positional parameter, which no variable of the agent can shadow
exec < /dev/null
[ -d /.sandbox ] || mkdir /.sandbox 2> /dev/null
[ -r /.sandbox/state ] && . /.sandbox/state 2> /dev/null
trap '{ set +x; { declare -f; declare -px; printf "cd -- %q\n" "$PWD"; } > /.sandbox/new &&
    builtin command -p mv -fT /.sandbox/new /.sandbox/state; } 2> /dev/null' EXIT
eval "$1"
"""

_INSIDE = rf"""
root=$(realpath .)
inside() {{ # exit if the path, or a link in it, leads out of the work tree
    case $(realpath -m -- "$1")/ in "$root"/*) ;; *) echo "$2"; exit {_LEADS_OUT} ;; esac
}}
"""

# stdin: names, one per line. Their parents must be in the work tree. What has these names is removed, and what is in
# the place of a parent without being a directory.
CLEAR = f"""{_INSIDE}
mapfile -t names
for name in "${{names[@]}}"; do
    above=$(dirname -- "$name")
    while [ "$above" != . ]; do
        [ -d "$above" ] || rm -f -- "$above"
        above=$(dirname -- "$above")
    done
    inside "$(dirname -- "$name")" "$name"
    chmod u+rwx -- "$(dirname -- "$name")" 2> /dev/null
done
rm -rf -- "${{names[@]}}"
"""

UNPACK = "tar -x --no-same-owner -f -"

# stdin: a folder's name; output: a tar archive of the regular files below it.
PACK = f"""{_INSIDE}
folder=$(cat)
inside "$folder" "$folder"
chmod -R u+rwX -- "$folder" 2> /dev/null
find "$folder" \\( -name .git -o -name __pycache__ \\) -prune -o -type f -print0 2> /dev/null |
    tar -c -f - --null --no-recursion --hard-dereference --verbatim-files-from -T - 2> /dev/null
"""

# stdin: a number of bytes and a path, each on a line.
READ = f"""
IFS= read -r bytes
IFS= read -r path
{file_scripts.READ}
"""

# stdin: a path on the first line, then the content.
WRITE = f"""
IFS= read -r path
{file_scripts.WRITE}
"""


def failure(exit_code: int, output: str) -> Exception:
    """Return the exception for the exit code of a file script."""
    if exit_code == _LEADS_OUT:
        return EnvironmentBroken(f"{output!r} leads out of the work tree")
    if exit_code in file_scripts.EXIT_CODES:
        return file_scripts.error(exit_code, output)
    return EnvironmentBroken(f"files could not be moved: exit code {exit_code} {output[-300:]}".rstrip())
