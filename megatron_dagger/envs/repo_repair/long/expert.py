"""The teacher of the long repairs: it works through the comments, checks every step, and knows the way back.

For each comment: read the first one of the list, edit the line, look at the diff, run the tests, commit with the
comment taken off the list. It uses only the conversation: from the commands and what they printed it infers where the
shell is, what has been changed and what has been tested (``Work``), and acts on that. Whatever the commands before
were, it continues from there: it discards an edit that is not the wanted one and reads the comment again, tests what
was committed without a test and takes it back if that fails, and where it cannot tell it starts again from the task's
first commit. It knows the rules that terse comments name; after a wrong guess it reads the longer comment.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass

from megatron_dagger.envs.repo_repair.expert import turns
from megatron_dagger.envs.repo_repair.long.rules import pieces
from megatron_dagger.envs.repo_repair.long.tasks import COMMENT, TERSE_COMMENT
from megatron_dagger.types import Message

READ = "head -1 todo/list"
READ_MORE = "head -1 todo/more"
DIFF = "git diff | grep ^[-+]"
DISCARD = "git checkout :/"
TEST = "head -1 todo/tests | xargs pytest"
TAKE = "sed -i 1d todo/* && git commit -qam fix"
RESTART = "git reset -q --hard start && git clean -qfd :/"
ALL_TESTS = "pytest @all.tests"

_COMMIT = re.compile(r"git commit -qam \S+")
_CD = re.compile(r"cd(?: (\S+))?")
_PASSED = re.compile(r"\d+ passed")
_HARMLESS = re.compile(
    r"(cat|ls|pwd|grep|head|tail|echo|pytest|git (diff|status|log|show))\b[^>;&|]*(\| ?(grep|head)\b[^>;&|]*)?"
)
_FAILED = re.compile(r"not found|rror|usage|fatal|No such file|sed: ")


@dataclass(frozen=True, slots=True)
class Comment:
    """What a comment says: in line ``line`` of ``path`` the first ``wrong`` must be ``right``."""

    path: str
    line: str
    wrong: str
    right: str
    terse: bool = False

    @classmethod
    def read(cls, reply: str) -> Comment | None:
        """Return the comment that was printed; None if it is none."""
        if match := COMMENT.fullmatch(reply):
            return cls(match["path"], match["line"], match["wrong"], match["right"])
        if match := TERSE_COMMENT.fullmatch(reply):
            wrong, right = pieces(int(match["rule"]))
            return cls(match["path"], match["line"], wrong, right, terse=True)
        return None

    @property
    def edit(self) -> str:
        return f"sed -i '{self.line}s/{self.wrong}/{self.right}/' {self.path}"

    def explains(self, diff: str) -> bool:
        """Return whether ``diff`` is the wanted change of one line, as far as it shows."""
        match diff.split("\n"):
            case [old, new, before, after] if (old, new) == (f"--- a/{self.path}", f"+++ b/{self.path}"):
                return before[:1] == "-" and after == "+" + before[1:].replace(self.wrong, self.right, 1)
        return False


@dataclass(slots=True)
class Work:
    """What a conversation shows of the state of the work."""

    folder: str | None = ""  # of the shell, below the root; None: unknown
    comment: Comment | None = None  # the first of the list, if it was read
    empty: bool = False  # the list was read, and has no comment
    fresh: bool = False  # the comment has just been read
    edited: bool = False  # its edit was made since
    mistaken: bool = False  # another edit was made since
    changed: bool | None = False  # the work tree since the last commit; None: unknown
    right: bool = False  # the change is the wanted one
    tested: bool | None = None  # whether the comment's tests passed since the last change; None: they were not run
    committed: int = 0  # times, without a passed test
    taken: bool = False  # the comment off the list, likewise
    finished: bool | None = None  # whether all tests passed since the last change; None: they were not run
    lost: bool = False  # something happened that only a restart mends

    def touched(self) -> None:
        """Note that the work tree may have changed."""
        self.changed, self.right, self.tested, self.finished, self.empty = None, False, None, None, False

    def clean(self) -> None:
        """Note that the work tree is that of the last commit."""
        self.changed, self.right = False, False

    def go_on(self) -> None:
        """Note that the work on a comment is over: the list begins with another one."""
        self.comment, self.edited, self.mistaken, self.tested = None, False, False, None
        self.committed, self.taken = 0, False


def work_after(messages: tuple[Message, ...]) -> Work:
    """Return the state of the work at the end of a conversation."""
    work = Work()
    for command, reply in turns(messages):
        _follow(work, command.strip(), reply)
    return work


def _follow(work: Work, command: str, reply: str) -> None:
    """Bring ``work`` up to date with a command and what it printed."""
    if match := _CD.fullmatch(command):
        if match[1] is None:
            work.folder = ""
        elif not reply:
            work.folder = _moved(work.folder, match[1])
        return
    work.fresh = False
    if command in (READ, READ_MORE):
        if comment := Comment.read(reply):
            work.comment, work.fresh, work.edited = comment, True, False
        work.empty = not reply
    elif command == DIFF:
        if reply:
            work.changed, work.right = True, work.comment is not None and work.comment.explains(reply)
        else:
            work.clean()
    elif command == ALL_TESTS:
        work.finished = _PASSED.fullmatch(reply) is not None
    elif command == TEST:
        if work.folder == "":
            work.tested = _PASSED.fullmatch(reply) is not None
    elif _COMMIT.fullmatch(command):
        if not reply and work.changed is not False:
            work.committed += 1
            work.clean()
        elif "nothing to commit" in reply:
            work.clean()
    elif command == TAKE:
        if not reply:
            work.clean()
            work.empty = False
            if work.comment and work.tested:
                work.go_on()
            else:
                work.committed += 1
                work.taken = True
    elif command == DISCARD:
        if work.changed is not False:
            work.touched()
            work.edited = False
        work.clean()
    elif work.committed and command == take_back(work.committed) and not reply:
        work.touched()
        work.clean()
        work.committed, work.taken, work.edited = 0, False, False
    elif command == RESTART:
        work.touched()
        work.clean()
        work.lost = False
        work.go_on()
    elif not _HARMLESS.fullmatch(command) and not _FAILED.search(reply):
        work.touched()
        work.edited = work.comment is not None and command == work.comment.edit and work.folder == ""
        work.mistaken = work.mistaken or (work.comment is not None and not work.edited)
        work.folder = None if re.search(r"\bcd\b", command) else work.folder
        work.lost = work.lost or command.startswith("git")


def next_command(messages: tuple[Message, ...]) -> str:
    """Return the expert's command for the state that ``messages`` show."""
    work = work_after(messages)
    comment = work.comment
    if work.lost:
        return RESTART
    if work.changed is None:
        return DIFF
    if work.changed and not work.right:
        return DISCARD
    if work.taken:
        return take_back(work.committed)
    if work.empty:
        if work.finished is None:
            return _at_root(work, ALL_TESTS)
        return "submit" if work.finished else RESTART
    if comment is None:
        return _at_root(work, READ)
    if work.tested:
        return _at_root(work, TAKE)
    if work.changed or work.edited or work.committed:
        if work.tested is None:
            return _at_root(work, TEST)
        return take_back(work.committed) if work.committed else RESTART
    if comment.terse and work.mistaken:
        return _at_root(work, READ_MORE)
    return _at_root(work, comment.edit if work.fresh else READ)


def take_back(commits: int) -> str:
    return f"git reset -q --hard HEAD~{commits}"


def _at_root(work: Work, command: str) -> str:
    return command if work.folder == "" else "cd"


def _moved(folder: str | None, to: str) -> str | None:
    """Return the shell's folder after ``cd to``; None if it cannot be told."""
    if to == "~" or to.startswith("~/"):
        folder, to = "", to[2:] or "."
    if folder is None or not re.fullmatch(r"\w[\w./-]*|\.\.?[\w./-]*", to):
        return None
    moved = posixpath.normpath(posixpath.join(folder, to))
    return None if moved.startswith("..") else "" if moved == "." else moved
