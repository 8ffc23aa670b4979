"""The command ``megatron-dagger``: one module of this package per command."""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import sys
import traceback
from types import ModuleType

import megatron_dagger
from megatron_dagger.cli.arguments import CommandParser, suggestion
from megatron_dagger.config import ConfigError
from megatron_dagger.policies.base import BudgetSpent

logger = logging.getLogger("megatron_dagger.cli.main")  # the same name when this module runs as __main__

GROUPS = {
    "run": ("run", "create", "rollout", "train", "evaluate"),
    "inspect": ("status", "report", "show", "replay", "export"),
    "prepare": ("recipes", "plan", "doctor", "validate", "convert"),
    "grade": ("grade",),
}
COMMANDS = tuple(name for names in GROUPS.values() for name in names)
OLD_NAMES = {"admit": "validate"}
OTHER_NAMES = {  # of other tools, for suggestions
    "collect": "rollout",
    "resume": "run",
    "start": "run",
    "init": "create",
    "list": "recipes",
    "eval": "evaluate",
}

USAGE = """\
usage: megatron-dagger COMMAND ...        (megatron-dagger COMMAND --help explains a command)

DAgger for long-horizon language-model agents, on Megatron-Core and vLLM: the student acts, a teacher labels every
state it reaches, the student is trained on the labels, and the next round begins.
"""
EXAMPLES = """\
examples:
  megatron-dagger run runs/first --recipe quickstart      start a run, or resume it
  megatron-dagger status runs/first                       show its progress, also while it runs
  megatron-dagger show runs/first --failed                read an episode, turn by turn
  megatron-dagger plan qwen3_8b_swegym_8h100              memory, rates and hours on GPUs, before you queue it
  megatron-dagger doctor qwen3_8b_swegym_8h100            what this machine lacks for it, and the way out

A killed run resumes when its command is repeated. Settings are changed by NAME=VALUE, such as dagger.rounds=5 or
training.optimizer.lr=1e-3; `megatron-dagger run RUN --recipe NAME --dry-run` prints all of them.

options: --version; --debug (print the traceback of an error; before or after COMMAND)
exit codes: 0 done; 1 a part failed; 2 the settings, the data or the machine are at fault; 75 stopped by SIGTERM or
SIGUSR1 after saving (a job's script requeues its job then)
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; return its exit code. Wrong usage raises SystemExit(2), as in argparse."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help", "help"):
        if not rest:
            print(usage())
            return 0
        name, rest = rest[0], ["--help"]
    if name in ("-v", "-V", "--version", "version"):
        print(f"megatron-dagger {megatron_dagger.__version__}")
        return 0
    name = OLD_NAMES.get(name, name)
    if name not in COMMANDS:
        hint = f"; did you mean {OTHER_NAMES[name]}?" if name in OTHER_NAMES else suggestion(name, COMMANDS)
        sys.stderr.write(
            f"error: there is no command {name!r}{hint}\n"
            f"commands: {', '.join(COMMANDS)}; `megatron-dagger --help` explains them\n"
        )
        raise SystemExit(2)
    module = command_module(name)
    return _run(module, command_parser(name, module).parse(rest), debug=debug)


def usage() -> str:
    """Return the text of ``megatron-dagger --help``."""
    lines = [USAGE]
    for group, names in GROUPS.items():
        lines.append(f"{group}:")
        lines += [f"  {name:10} {_help(command_module(name))}" for name in names]
        lines.append("")
    return "\n".join([*lines, EXAMPLES])


def command_module(name: str) -> ModuleType:
    return importlib.import_module(f"megatron_dagger.cli.{name}")


def command_parser(name: str, module: ModuleType) -> CommandParser:
    """Return the parser of one command; its description is the module's docstring."""
    parser = CommandParser(f"megatron-dagger {name}", description=module.__doc__)
    module.add_arguments(parser)
    return parser


def _help(module: ModuleType) -> str:
    return (module.__doc__ or "").strip().splitlines()[0]


def _run(module: ModuleType, arguments: argparse.Namespace, *, debug: bool) -> int:
    try:
        return int(module.main(arguments))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; repeat the command to resume\n")
        return 130
    except ConfigError as error:
        return _fail(error, str(error), code=2, debug=debug)
    except (ValueError, OSError) as error:  # the data or the machine are at fault; or we are, and --debug says where
        return _fail(error, f"{error}{_where()}", code=2, debug=debug)
    except BudgetSpent as error:
        return _fail(error, str(error), code=1, debug=debug)
    except RuntimeError as error:  # a part failed under way: everything committed is kept
        message = f"{type(error).__name__}: {error}{_where()}\nrepeat the command to resume"
        return _fail(error, message, code=1, debug=debug)
    finally:
        gc.freeze()  # else the interpreter's end walks through all objects of vLLM and torch, for seconds


def _fail(error: Exception, message: str, *, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    sys.stderr.write(f"error: {message}\n")
    logger.debug("the error came from here", exc_info=error)
    return code


def _where() -> str:
    """Return where the traceback of an error can be read."""
    from megatron_dagger.observability.logs import current_log_file

    log = current_log_file()
    return f" (traceback: {log})" if log is not None else " (--debug prints the traceback)"


if __name__ == "__main__":
    sys.exit(main())
