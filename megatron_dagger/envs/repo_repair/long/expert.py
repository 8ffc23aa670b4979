"""The teacher of the long repairs: it works through the comments, checks every step, and knows the way back.

For each comment: read it, go to the file's folder, edit the line, look at the diff, go back, run the tests, commit. It
names the folder from the root, so that the same commands are right after a comment wherever it is read. It uses only
the conversation: from the commands and what they printed it infers where the shell is, what has been changed and what
has been verified (``Work``), and acts on that. Whatever the commands before were, it continues from there: it discards
an edit that is not the wanted one and reads the comment again, tests what was committed without a test and takes it
back if that fails, and where it cannot tell it starts again from the task's first commit. It knows the rules that
terse comments name; after a wrong guess it looks up what the rule means there.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass

from megatron_dagger.envs.repo_repair.expert import turns
from megatron_dagger.envs.repo_repair.long.rules import pieces
from megatron_dagger.envs.repo_repair.long.tasks import COMMENT, LAST, TERSE_COMMENT, first_name
from megatron_dagger.types import Message

COMMIT = "git commit -qam fix"
DIFF = "git diff | grep ^[-+]"
DISCARD = "git checkout :/"
RESTART = "git reset -q --hard start && git clean -qfd :/"
ALL_TESTS = f"pytest @todo/{LAST}.tests"

_READ = re.compile(r"cat (?:~/)?todo/(\w+)\.(md|more)")
_TEST = re.compile(r"pytest @todo/(\w+)\.tests")
_COMMIT = re.compile(r"git commit -qam \S+")
_CD = re.compile(r"cd(?: (\S+))?")
_PASSED = re.compile(r"\d+ passed")
_HARMLESS = re.compile(
    r"(cat|ls|pwd|grep|head|tail|echo|pytest|git (diff|status|log|show))\b[^>;&|]*(\| ?(grep|head)\b[^>;&|]*)?"
)
_FAILED = re.compile(r"not found|rror|usage|fatal|No such file|sed: ")


@dataclass(frozen=True, slots=True)
class Comment:
    """What a comment says: in line ``line`` of ``folder/file`` the first ``wrong`` must be ``right``; then ``next``."""

    folder: str
    file: str
    line: str
    wrong: str
    right: str
    next: str  # name of the next comment
    rule: str = ""  # if the comment names only this

    @classmethod
    def read(cls, reply: str) -> Comment | None:
        """Return the comment that was printed; None if it is none."""
        if match := COMMENT.fullmatch(reply):
            return cls(match["folder"], match["file"], match["line"], match["wrong"], match["right"], match["next"])
        if match := TERSE_COMMENT.fullmatch(reply):
            wrong, right = pieces(int(match["rule"]))
            return cls(match["folder"], match["file"], match["line"], wrong, right, match["next"], match["rule"])
        return None

    @property
    def edit(self) -> str:
        return f"sed -i '{self.line}s/{self.wrong}/{self.right}/' {self.file}"

    def explains(self, diff: str) -> bool:
        """Return whether ``diff`` is the wanted change of one line, as far as it shows."""
        path = f"{self.folder}/{self.file}"
        match diff.split("\n"):
            case [old, new, before, after] if (old, new) == (f"--- a/{path}", f"+++ b/{path}"):
                return before[:1] == "-" and after == "+" + before[1:].replace(self.wrong, self.right, 1)
        return False


@dataclass(slots=True)
class Work:
    """What a conversation shows of the state of the work."""

    first: str  # name of the task's first comment
    name: str  # of the comment to be worked on; LAST: all are repaired, tested and committed
    folder: str | None = ""  # of the shell, below the root; None: unknown
    comment: Comment | None = None  # the one of this name, if it was read
    fresh: bool = False  # it has just been read
    entered: bool = False  # and the shell was sent to its folder since
    edited: bool = False  # its edit was made since
    mistaken: bool = False  # another edit was made since
    changed: bool | None = False  # the work tree since the last commit; None: unknown
    right: bool = False  # the change is the wanted one
    tested: bool | None = None  # whether the comment's tests passed since the last change; None: they were not run
    committed: int = 0  # times, without a passed test
    finished: bool | None = None  # whether all tests passed since the last change; None: they were not run
    lost: bool = False  # something happened that only a restart mends

    def touched(self) -> None:
        """Note that the work tree may have changed."""
        self.changed, self.right, self.tested, self.finished = None, False, None, None

    def clean(self) -> None:
        """Note that the work tree is that of the last commit."""
        self.changed, self.right = False, False

    def go_on(self, name: str) -> None:
        """Note that the comment of this name is to be worked on now."""
        self.name, self.comment, self.edited, self.mistaken = name, None, False, False
        self.tested, self.committed = None, 0


def work_after(messages: tuple[Message, ...]) -> Work:
    """Return the state of the work at the end of a conversation."""
    first = first_name(messages[1].content) if len(messages) > 1 else LAST
    work = Work(first=first, name=first)
    for command, reply in turns(messages):
        _follow(work, command.strip(), reply)
        if work.comment and work.tested and work.changed is False:
            work.go_on(work.comment.next)
    return work


def _follow(work: Work, command: str, reply: str) -> None:
    """Bring ``work`` up to date with a command and what it printed."""
    if match := _CD.fullmatch(command):
        if match[1] is None:
            work.folder = ""
        elif not reply:
            work.folder = _moved(work.folder, match[1])
        work.entered = work.comment is not None and work.folder == work.comment.folder
        return
    work.fresh = False
    if match := _READ.fullmatch(command):
        comment = Comment.read(reply)
        wanted = work.name if match[2] == "md" else work.comment.rule if work.comment else ""
        if comment and match[1] == wanted:
            work.comment, work.fresh, work.entered, work.edited = comment, True, False, False
    elif command == DIFF:
        if reply:
            work.changed, work.right = True, work.comment is not None and work.comment.explains(reply)
        else:
            work.clean()
    elif command == ALL_TESTS:
        work.finished = _PASSED.fullmatch(reply) is not None
    elif match := _TEST.fullmatch(command):
        if match[1] == work.name:
            work.tested = _PASSED.fullmatch(reply) is not None
    elif _COMMIT.fullmatch(command):
        if not reply and work.changed is not False:
            work.committed += 1
            work.clean()
        elif "nothing to commit" in reply:
            work.clean()
    elif command == DISCARD:
        if work.changed is not False:
            work.touched()
            work.edited = False
        work.clean()
    elif work.committed and command == take_back(work.committed) and not reply:
        work.touched()
        work.clean()
        work.committed, work.edited = 0, False
    elif command == RESTART:
        work.touched()
        work.clean()
        work.lost = False
        work.go_on(work.first)
    elif not _HARMLESS.fullmatch(command) and not _FAILED.search(reply):
        work.touched()
        work.edited = work.comment is not None and command == work.comment.edit and work.folder == work.comment.folder
        work.mistaken = work.mistaken or (work.comment is not None and not work.edited)
        work.folder = None if re.search(r"\bcd\b", command) else work.folder
        work.lost = work.lost or command.startswith("git")


def next_command(messages: tuple[Message, ...]) -> str:
    """Return the expert's command for the state that ``messages`` show."""
    work = work_after(messages)
    if work.lost:
        return RESTART
    if work.changed is None:
        return DIFF
    if work.changed and not work.right:
        return DISCARD
    if work.name == LAST:
        if work.finished is None:
            return _at_root(work, ALL_TESTS)
        return "submit" if work.finished else RESTART
    if work.changed and work.tested:
        return COMMIT
    if (work.changed or work.edited or work.committed) and not work.tested:
        if work.tested is None:
            return _at_root(work, f"pytest @todo/{work.name}.tests")
        return take_back(work.committed) if work.committed else RESTART
    if work.comment and work.comment.rule and work.mistaken:
        return f"cat ~/todo/{work.comment.rule}.more"
    if work.comment is None or not work.fresh:
        return _at_root(work, f"cat todo/{work.name}.md")
    return work.comment.edit if work.entered else f"cd ~/{work.comment.folder}"


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
