"""Arguments that several commands share, and a parser whose errors suggest a correction."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_dagger.config import ConfigError, RunConfig, override
from megatron_dagger.planning import GPUS
from megatron_dagger.planning.gpus import ANY_GPU, DEFAULT_GPU

if TYPE_CHECKING:
    from megatron_dagger.types import Trajectory

TAKE_OVER = "take the run over from another process (for example on a lost node); that process can no longer write"


class CommandParser(argparse.ArgumentParser):
    """The parser of one command: options and positional arguments may alternate; errors come with suggestions."""

    def __init__(self, prog: str, description: str | None = None):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=formatter, allow_abbrev=False)
        self._nested = False

    def nested(self) -> argparse._SubParsersAction[CommandParser]:
        """Add commands below this one and return where to add them."""
        self._nested = True
        return self.add_subparsers(required=True, metavar="COMMAND", parser_class=_NestedParser)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        return self.parse_args(argv) if self._nested else self.parse_intermixed_args(argv)

    def error(self, message: str) -> NoReturn:
        kind, _, extra = message.partition(": ")
        if kind == "unrecognized arguments":
            message += self._advice(extra.split()[0])
        self.print_usage(sys.stderr)
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(2)

    def _advice(self, word: str) -> str:
        if word.startswith("--") and "." in word:
            return f" (settings are NAME=VALUE, without dashes: {word.lstrip('-')})"
        options = [option for action in self._actions for option in action.option_strings if action.dest != "help"]
        return suggestion(word.partition("=")[0], options) if word.startswith("--") else ""


class _NestedParser(CommandParser):
    """The parser of a command below another: reports unknown arguments itself, not through the outer parser."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the one of ``known`` with these initials or nearly this spelling, or nothing."""
    names = list(known)
    close = [name for name in names if "".join(part[:1] for part in name.strip("-").split("-")) == word.strip("-")]
    close = close or difflib.get_close_matches(word, names, n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=_run_dir, metavar="RUN", help="the run directory")


def add_settings(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("settings", nargs="*", default=[], type=setting, metavar="NAME=VALUE", help=text)


def add_new_run(parser: argparse.ArgumentParser) -> None:
    """Add the options of the commands that create a run."""
    parser.add_argument("--dry-run", "--print", action="store_true", help="check and print the settings, write nothing")
    parser.add_argument(
        "--gpu",
        type=str.lower,
        choices=[*sorted(GPUS), ANY_GPU],
        help=f"the kind of GPU whose memory the run must fit (default: {DEFAULT_GPU}; {ANY_GPU}: do not check)",
    )


def add_round(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--round", type=int, dest="round_index", metavar="N", help=text)


def add_episode_filter(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose recorded episodes, for ``chosen_episodes``."""
    add_round(parser, "the round (default: the last one with episodes)")
    parser.add_argument("--evaluation", action="store_true", help="episodes of the evaluation, not of the collection")
    parser.add_argument("--task", default="", metavar="TEXT", help="only tasks whose id contains TEXT")
    add_failed(parser)


def chosen_episodes(arguments: argparse.Namespace) -> Iterator[Trajectory]:
    """Yield the episodes that the options of ``add_episode_filter`` choose. Raises ConfigError if there is none."""
    from megatron_dagger.driver.episodes import find_episodes

    return find_episodes(
        arguments.run_dir,
        round_index=arguments.round_index,
        evaluation=arguments.evaluation,
        task=arguments.task,
        failed=arguments.failed,
    )


def add_failed(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--failed", action="store_true", help="only episodes that did not solve their task")


def setting(text: str) -> str:
    """Return ``text`` if it is NAME=VALUE."""
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a setting: write NAME=VALUE, such as dagger.rounds=5")
    return text


def _run_dir(text: str) -> Path:
    if Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is a file, not a run directory")
    return Path(text)


def recipe_or_run(arguments: Sequence[str], recipe: str | None) -> tuple[str, RunConfig]:
    """Return the name and the config of the one recipe or run among ``arguments``, the others of which are settings.

    Raises ConfigError unless there is just one, ``recipe`` included.
    """
    from megatron_dagger.driver.run_dir import CONFIG, load_run_config

    settings = [argument for argument in arguments if "=" in argument]
    names = [argument for argument in arguments if "=" not in argument] + ([recipe] if recipe else [])
    if len(names) != 1:
        raise ConfigError(f"name one recipe or run directory, not {len(names)} ({' '.join(names) or 'none'})")
    [name] = names
    if Path(name, CONFIG).is_file():
        return name, override(load_run_config(Path(name)), settings)
    return name, override(recipe_config(name), settings)


def recipe_config(name: str) -> RunConfig:
    """Return the config of a recipe. Raises ConfigError with a suggestion if there is no such recipe."""
    from megatron_dagger.recipes import find_recipe

    return find_recipe(name)()
