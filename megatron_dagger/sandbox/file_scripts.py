"""The shell scripts with which the engines read and write any file, and the errors of those that cannot.

What a file system refuses is the agent's mistake: a missing file, a parent that is no directory, no permission, a full
disk, a name that is too long, links in a circle, a device. It is an OSError that says why.
"""

from __future__ import annotations

_MISSING, _IS_DIRECTORY, _REFUSED = 82, 83, 84
EXIT_CODES = (_MISSING, _IS_DIRECTORY, _REFUSED)

_CHECK = f"""
LC_ALL=C
refuse() {{ echo "${{1##*: }}" >&2; exit {_REFUSED}; }}
[ -d "$path" ] && exit {_IS_DIRECTORY}
[ -e "$path" ] && [ ! -f "$path" ] && refuse "it is not a regular file"
"""

# $path: ends with a refusal if the file cannot be read.
CHECK_READABLE = f"""{_CHECK}
problem=$( {{ : < "$path"; }} 2>&1 ) || case $problem in
    *"No such file"*) exit {_MISSING} ;;
    *) refuse "$problem" ;;
esac
"""

# $path, $bytes: output is the first $bytes bytes of the file.
READ = f"""{CHECK_READABLE}
head -c "$bytes" < "$path" || refuse "it cannot be read"
"""

# $path: writes stdin to the file, and makes the directories above it.
WRITE = f"""{_CHECK}
above=$(dirname -- "$path")
[ -e "$above" ] && [ ! -d "$above" ] && refuse "Not a directory"
problem=$( {{ mkdir -p -- "$above" && cat > "$path"; }} 2>&1 ) || refuse "$problem"
"""


def error(exit_code: int, output: str) -> OSError:
    """Return the error for one of ``EXIT_CODES``; ``output`` ends with the reason of a refusal."""
    if exit_code == _MISSING:
        return FileNotFoundError("it does not exist")
    if exit_code == _IS_DIRECTORY:
        return IsADirectoryError("it is a directory")
    return OSError(output.strip().rpartition("\n")[2][-200:] or "the file system refuses it")
