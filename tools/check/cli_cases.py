"""Calls of the command line with their expected outcomes: mistakes that users make, and calls that must work.

``cli_case.py`` runs a case, in a directory that it prepares. ``run_cases`` returns the cases that failed.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dagger.cli.main import OTHER_NAMES
from tools.check.cli_case import Case, problem_of, right, wrong
from tools.check.cli_run_cases import NEW_RUN, RUN_CASES

COMMAND_CASES = (
    right("--version", ("--version",), "megatron-dagger "),
    right("help", ("help",), "inspect:", "exit codes"),
    right("help of a command", ("help", "run"), "usage: megatron-dagger run"),
    right("no command", (), "usage: megatron-dagger COMMAND"),
    wrong("an unknown command", ("statsu", "q"), "there is no command 'statsu'; did you mean status?"),
    Case(
        name="--debug prints the traceback",
        argv=("--debug", "show", "nowhere"),
        code=2,
        says=("Traceback", "nowhere is not a run directory"),
        never_says=(),
    ),
    right("the old name of validate", ("admit", "--help"), "usage: megatron-dagger validate"),
    wrong("status of a missing run", ("status", "nowhere"), "nowhere is not a run directory (it has no config.yaml)"),
    wrong("report on a missing run", ("report", "nowhere"), "nowhere is not a run directory", absent=("nowhere",)),
    Case(
        name="no episodes yet",
        argv=("show", "m"),
        before=(("create", "m", "--recipe", "short_repair"),),
        code=2,
        says=("m has no collected episodes yet",),
    ),
    wrong("a round without episodes", ("show", "q", "--round", "1"), "round 1 has no episodes; rounds that have: 0"),
    Case(
        name="no evaluation yet",
        argv=("export", "m", "--out", "x", "--evaluation"),
        before=(("create", "m", "--recipe", "short_repair"),),
        code=2,
        says=("m has no evaluated episodes yet",),
    ),
    wrong("a round that is not a number", ("export", "q", "--out", "x", "--round", "a"), "'a' is neither a number"),
    wrong("nothing to grade", ("grade", "q", "--check"), "q has no SWE-bench tasks to grade"),
    wrong(
        "data sets that do not exist",
        ("validate", "r.json", "swe.train=no.jsonl", "swe.heldout=no.jsonl"),
        "no.jsonl: no such file",
    ),
    wrong("a conversion of a missing checkpoint", ("convert", "inspect", "nowhere"), "nowhere"),
    # errors that say what to write
    *(
        wrong(f"{word} is a command's name elsewhere", (word, "q"), f"command {word!r}; did you mean {name}?")
        for word, name in OTHER_NAMES.items()
    ),
    right(
        "a recipe is described",
        ("recipes", "smollm2_135m_repair_1gpu"),
        "SmolLM2-135M-Instruct repairs",
        "convert hf-to-megatron",
        "model llama, 134.5M",
        "hardware 1 GPU, bf16",
    ),
    right("recipes are listed", ("recipes",), "quickstart", "`megatron-dagger recipes NAME`"),
    Case(
        name="an option without a near one gets no suggestion",
        argv=("run", "q", "--resume"),
        code=2,
        says=("unrecognized arguments: --resume",),
        never_says=("did you mean",),
    ),
    wrong(
        "a conversion's wrong option has its own usage",
        ("convert", "hf-to-megatron", "a", "b", "--tp", "2"),
        "usage: megatron-dagger convert hf-to-megatron",
        "did you mean --tensor-parallel?",
    ),
    wrong(
        "a model to download first",
        ("convert", "hf-to-megatron", "Qwen3-8B", "x"),
        "Qwen3-8B: no such directory; download the checkpoint first",
    ),
    wrong(
        "an export of failed and solved episodes only",
        ("export", "q", "--out", "x", "--failed", "--solved"),
        "usage: megatron-dagger export",
        "argument --solved: not allowed with argument --failed",
    ),
    Case(
        name="an export to an existing file is refused",
        argv=("export", "q", "--out", "rows.jsonl"),
        code=2,
        says=("rows.jsonl exists already",),
        never_says=("traceback",),
    ),
    Case(
        name="the log of another process has no traceback of this one",
        argv=("report", "q", "--out", "rows.jsonl/x"),
        code=2,
        says=("(--debug prints the traceback)",),
        never_says=("driver.log",),
    ),
    wrong("a setting of a group", (*NEW_RUN, "training.micro_batch_size=1"), "; there are: parallel, optimizer"),
    wrong("a setting of no group", (*NEW_RUN, "learning_rate=1"), "--dry-run` prints all settings"),
    wrong("a group is not a value", (*NEW_RUN, "dagger.beta=0.5"), "dagger.beta is a group of settings: set dagger."),
    wrong("a group that is null", (*NEW_RUN, "model.yarn.factor=2"), "write 'model.yarn={factor: 2}'"),
    wrong("a list left empty", (*NEW_RUN, "teacher.urls="), "for none write teacher.urls=[]"),
    right(
        "a mapping keeps the other values of its group",
        (*NEW_RUN, "--dry-run", "dagger={rounds: 1}"),
        "rounds: 1",
        "tasks_per_round: 44",
    ),
    wrong("a missing settings file", ("create", "n", "--config", "no.yaml"), "error: cannot read no.yaml: No such"),
    wrong("a directory of settings", ("create", "n", "--config", "."), "error: cannot read .: Is a directory"),
    wrong("a file in place of a run", ("create", "rows.jsonl"), "rows.jsonl is a file, not a run directory"),
    wrong("an empty config.yaml", ("show", "empty"), "empty/config.yaml is empty: not a run's settings"),
    wrong("a report onto a directory", ("report", "q", "--out", "."), "--out . is a directory; name the file"),
    wrong("a negative number of episodes", ("report", "q", "--episodes", "-5"), "--episodes -5 must not be negative"),
    wrong(
        "the list of evaluated episodes",
        ("show", "q", "--evaluation", "--task", "nosuch"),
        "`megatron-dagger show q --round 0 --evaluation --list`",
    ),
    right(
        "plan takes a GPU's name in capitals",
        ("plan", "qwen3_8b_swegym_8h100", "--gpu", "H100"),
        "8.19B parameters on 8 x h100",
        "slurm/single_node_with_teacher.sbatch",
    ),
    right("plan counts a small model in millions", ("plan", "quickstart"), "0.5M parameters"),
    wrong("an impossible worker", ("rollout", "q", "--round", "0", "--worker", "4/4"), "worker 4/4"),
)
CASES = (*RUN_CASES, *COMMAND_CASES)


def run_cases(cases: Sequence[Case] = CASES) -> dict[str, str]:
    """Run the cases; return the problems of those that failed, by the case's name."""
    return {case.name: problem for case in cases if (problem := problem_of(case))}
