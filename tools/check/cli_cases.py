"""Calls of the command line with their expected outcomes: mistakes that users make, and calls that must work.

``cli_case.py`` runs a case, in a directory that it prepares. ``run_cases`` returns the cases that failed.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dagger.cli.main import OTHER_NAMES
from tools.check.cli_case import Case, problem_of

NEW_RUN = ("run", "n", "--recipe", "quickstart")
CONTEXT_PARALLEL = ("training.parallel.context_parallel_size=2", "training.parallel.world_size=8")
SWE = ("swe.train=rows.jsonl", "swe.heldout=rows.jsonl", "teacher.urls=[http://x/v1]", "teacher.model=m")


def _wrong(name: str, argv: Sequence[str], *says: str, absent: Sequence[str] = ()) -> Case:
    return Case(name=name, argv=argv, code=2, says=says, absent=absent)


CASES = (
    # a typo leaves no run directory behind
    _wrong(
        "a missing checkpoint is refused before anything is written",
        (*NEW_RUN, "init_checkpoint=/nope"),
        "init_checkpoint=/nope: no such directory",
        absent=("n",),
    ),
    _wrong(
        "an unknown package is refused before anything is written",
        (*NEW_RUN, "repo_repair.train_packages=[nosuchpackage]"),
        "repo_repair.train_packages",
        "nosuchpackage",
        absent=("n",),
    ),
    Case(
        name="a run without an episode can be created again with other settings",
        argv=("create", "m", "--recipe", "quickstart", "seed=2"),
        before=(("create", "m", "--recipe", "quickstart", "seed=1"),),
        code=0,
        says=("0 1 2",),
    ),
    # values that are not YAML
    _wrong(
        "broken YAML in a setting is named",
        (*NEW_RUN, "dagger.rounds=["),
        "dagger.rounds='['",
        "not a YAML value",
        absent=("n",),
    ),
    _wrong("a damaged config.yaml is named", ("show", "damaged"), "damaged/config.yaml is not a YAML file"),
    # the rules of the trainer and the planner are checked before round 0
    _wrong(
        "trainer rules are checked first",
        (*NEW_RUN, *CONTEXT_PARALLEL),
        "training.parallel.context_parallel_size=2",
        absent=("n",),
    ),
    _wrong(
        "trainer rules are checked in a dry run too",
        (*NEW_RUN, "--dry-run", *CONTEXT_PARALLEL),
        "training.parallel.context_parallel_size=2",
    ),
    _wrong(
        "a recipe that does not fit is refused with the nearest settings that fit",
        (
            "create",
            "n",
            "--recipe",
            "qwen3_8b_swegym_8h100",
            "training.parallel.tensor_model_parallel_size=2",
            "init_checkpoint=checkpoint",
            *SWE,
        ),
        "does not fit 8 x h100",
        "the nearest settings that fit: training.parallel.tensor_model_parallel_size=8",
        absent=("n",),
    ),
    _wrong(
        "a checkpoint of another model is refused",
        ("create", "n", "--recipe", "quickstart", "init_checkpoint=checkpoint"),
        "is of another model: model.num_layers=36, not ",
        absent=("n",),
    ),
    _wrong(
        "a dry run prints settings that are then refused",
        ("create", "n", "--recipe", "smollm2_135m_repair_1gpu", "--dry-run"),
        "family: llama",
        "no such directory",
        absent=("n",),
    ),
    # one way to name a recipe, and the usage of the right command
    Case(name="plan takes --recipe", argv=("plan", "--recipe", "qwen3_8b_swegym_8h100"), code=0, says=("turns/s",)),
    Case(name="plan takes a run directory", argv=("plan", "q"), code=0, says=("note: q trains in fp32",)),
    _wrong("two recipes are refused", ("plan", "quickstart", "--recipe", "quickstart"), "name one recipe"),
    _wrong(
        "a recipe in place of a run is explained",
        ("run", "quickstart"),
        "quickstart is a recipe: megatron-dagger run runs/quickstart --recipe quickstart",
    ),
    Case(
        name="run names the missing directory, not the optional settings",
        argv=("run",),
        code=2,
        says=("usage: megatron-dagger run", "required: RUN"),
        never_says=("NAME=VALUE\n",),
    ),
    Case(
        name="validate names the missing file, not the optional settings",
        argv=("validate",),
        code=2,
        says=("usage: megatron-dagger validate", "required: FILE"),
        never_says=("required: FILE, NAME=VALUE",),
    ),
    _wrong(
        "a setting is found by its last name",
        (*NEW_RUN, "lr=1e-3"),
        "unknown setting lr; did you mean training.optimizer.lr?",
        absent=("n",),
    ),
    _wrong(
        "a misspelt setting is suggested with its whole name",
        (*NEW_RUN, "dagger.round=1"),
        "did you mean dagger.rounds?",
    ),
    _wrong(
        "a setting without = has the command's own usage",
        (*NEW_RUN, "training.optimizer.lr", "1e-3"),
        "usage: megatron-dagger run",
        "'training.optimizer.lr' is not a setting: write NAME=VALUE",
    ),
    _wrong(
        "a setting with dashes is explained",
        (*NEW_RUN, "--training.optimizer.lr=1e-3"),
        "usage: megatron-dagger run",
        "settings are NAME=VALUE, without dashes: training.optimizer.lr=1e-3",
    ),
    _wrong("a stray word has the command's own usage", ("show", "q", "1"), "usage: megatron-dagger show", ": 1"),
    _wrong("a misspelt option is suggested", ("show", "q", "--rounds", "1"), "did you mean --round?"),
    _wrong("an option of another command", ("train", "q", "--worker", "0/2"), "usage: megatron-dagger train"),
    # changing an existing run
    Case(
        name="rounds can be raised",
        argv=("create", "q", "dagger.rounds=4"),
        code=0,
        says=("0 1 2 3 4",),
        settings=("  rounds: 4",),
    ),
    Case(
        name="an old script runs on after the rounds were raised",
        argv=("create", "q", "--recipe", "quickstart", "dagger.rounds=2"),
        before=(("create", "q", "dagger.rounds=4"),),
        code=0,
        settings=("  rounds: 4",),
    ),
    Case(
        name="a group of settings changes an existing run",
        argv=("create", "q", "--recipe", "quickstart", "dagger={rounds: 4}"),
        code=0,
        settings=("  rounds: 4",),
    ),
    _wrong("rounds cannot be lowered", ("create", "q", "dagger.rounds=1"), "dagger.rounds"),
    Case(
        name="a changed budget of a repeated command wins",
        argv=("create", "q", "--recipe", "quickstart", "teacher.token_budget=9"),
        code=0,
        settings=("  token_budget: 9",),
    ),
    Case(
        name="an old script does not lower a raised budget",
        argv=("create", "b", "--recipe", "quickstart", "teacher.token_budget=5"),
        before=(
            ("create", "b", "--recipe", "quickstart", "teacher.token_budget=5"),
            ("create", "b", "teacher.token_budget=50"),
        ),
        code=0,
        settings=("  token_budget: 50",),
        run="b",
    ),
    Case(
        name="another recipe for a run is refused in one line",
        argv=("run", "q", "--recipe", "smollm2_135m_repair_1gpu"),
        code=2,
        says=("q was created by recipe quickstart and has other settings", "more)"),
    ),
    # rounds
    _wrong("evaluate beyond the run", ("evaluate", "q", "--round", "7"), "round 7: this run has rounds 0 to 2"),
    _wrong("rollout beyond the run", ("rollout", "q", "--round", "3"), "round 3: this run has rounds 0 to 2"),
    _wrong("train beyond the run", ("train", "q", "--round", "-1"), "round -1: this run has rounds 0 to 2"),
    _wrong(
        "rollout needs --round or --resident", ("rollout", "q"), "usage: megatron-dagger rollout", "--round --resident"
    ),
    Case(
        name="a finished stage is reported and starts nothing",
        argv=("train", "q", "--round", "1"),
        code=0,
        says=("round 1 train: already done",),
        never_says=("making repair tasks", "Traceback"),
    ),
    # values of settings
    Case(
        name="a list of one needs no brackets",
        argv=(*NEW_RUN, "--dry-run", "teacher.urls=http://x/v1", "teacher.model=m"),
        code=0,
        says=("- http://x/v1",),
        absent=("n",),
    ),
    Case(
        name="old names of settings are read",
        argv=("create", "n", "--recipe", "quickstart", "--dry-run", "tasks.train_tasks=17"),
        code=0,
        says=("train_tasks: 17",),
    ),
    _wrong(
        "a mapping in place of a value", ("create", "n", "--recipe", "quickstart", "seed={a: 1}"), "seed: expected int"
    ),
    _wrong("an unknown recipe", ("create", "n", "--recipe", "quikstart"), "did you mean quickstart?"),
    # the command itself
    Case(name="--version", argv=("--version",), code=0, says=("megatron-dagger ",)),
    Case(name="help", argv=("help",), code=0, says=("inspect:", "exit codes")),
    Case(name="help of a command", argv=("help", "run"), code=0, says=("usage: megatron-dagger run",)),
    Case(name="no command", argv=(), code=0, says=("usage: megatron-dagger COMMAND",)),
    _wrong("an unknown command", ("statsu", "q"), "there is no command 'statsu'; did you mean status?"),
    Case(
        name="--debug prints the traceback",
        argv=("--debug", "show", "nowhere"),
        code=2,
        says=("Traceback", "nowhere is not a run directory"),
        never_says=(),
    ),
    Case(name="the old name of validate", argv=("admit", "--help"), code=0, says=("usage: megatron-dagger validate",)),
    _wrong("status of a missing run", ("status", "nowhere"), "nowhere is not a run directory (it has no config.yaml)"),
    _wrong("report on a missing run", ("report", "nowhere"), "nowhere is not a run directory", absent=("nowhere",)),
    Case(
        name="no episodes yet",
        argv=("show", "m"),
        before=(("create", "m", "--recipe", "quickstart"),),
        code=2,
        says=("m has no collected episodes yet",),
    ),
    _wrong("a round without episodes", ("show", "q", "--round", "1"), "round 1 has no episodes; rounds that have: 0"),
    Case(
        name="no evaluation yet",
        argv=("export", "m", "--out", "x", "--evaluation"),
        before=(("create", "m", "--recipe", "quickstart"),),
        code=2,
        says=("m has no evaluated episodes yet",),
    ),
    _wrong("a round that is not a number", ("export", "q", "--out", "x", "--round", "a"), "'a' is neither a number"),
    _wrong("nothing to grade", ("grade", "q", "--check"), "q has no SWE-bench tasks to grade"),
    _wrong(
        "data sets that do not exist",
        ("validate", "r.json", "swe.train=no.jsonl", "swe.heldout=no.jsonl"),
        "no.jsonl: no such file",
    ),
    _wrong("a conversion of a missing checkpoint", ("convert", "inspect", "nowhere"), "nowhere"),
    # errors that say what to write
    *(
        _wrong(f"{word} is a command's name elsewhere", (word, "q"), f"command {word!r}; did you mean {name}?")
        for word, name in OTHER_NAMES.items()
    ),
    Case(
        name="a recipe is described",
        argv=("recipes", "smollm2_135m_repair_1gpu"),
        code=0,
        says=(
            "SmolLM2-135M-Instruct repairs",
            "convert hf-to-megatron",
            "model llama, 134.5M",
            "hardware 1 GPU, bf16",
        ),
    ),
    Case(name="recipes are listed", argv=("recipes",), code=0, says=("quickstart", "`megatron-dagger recipes NAME`")),
    Case(
        name="an option without a near one gets no suggestion",
        argv=("run", "q", "--resume"),
        code=2,
        says=("unrecognized arguments: --resume",),
        never_says=("did you mean",),
    ),
    _wrong(
        "a conversion's wrong option has its own usage",
        ("convert", "hf-to-megatron", "a", "b", "--tp", "2"),
        "usage: megatron-dagger convert hf-to-megatron",
        "did you mean --tensor-parallel?",
    ),
    _wrong(
        "a model to download first",
        ("convert", "hf-to-megatron", "Qwen3-8B", "x"),
        "Qwen3-8B: no such directory; download the checkpoint first",
    ),
    _wrong(
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
    _wrong("a setting of a group", (*NEW_RUN, "training.micro_batch_size=1"), "; there are: parallel, optimizer"),
    _wrong("a setting of no group", (*NEW_RUN, "learning_rate=1"), "--dry-run` prints all settings"),
    _wrong("a group is not a value", (*NEW_RUN, "dagger.beta=0.5"), "dagger.beta is a group of settings: set dagger."),
    _wrong("a group that is null", (*NEW_RUN, "model.yarn.factor=2"), "write 'model.yarn={factor: 2}'"),
    _wrong("a list left empty", (*NEW_RUN, "teacher.urls="), "for none write teacher.urls=[]"),
    Case(
        name="a mapping keeps the other values of its group",
        argv=(*NEW_RUN, "--dry-run", "dagger={rounds: 1}"),
        code=0,
        says=("rounds: 1", "tasks_per_round: 44"),
    ),
    _wrong("a missing settings file", ("create", "n", "--config", "no.yaml"), "error: cannot read no.yaml: No such"),
    _wrong("a directory of settings", ("create", "n", "--config", "."), "error: cannot read .: Is a directory"),
    _wrong("a file in place of a run", ("create", "rows.jsonl"), "rows.jsonl is a file, not a run directory"),
    _wrong("an empty config.yaml", ("show", "empty"), "empty/config.yaml is empty: not a run's settings"),
    _wrong("a report onto a directory", ("report", "q", "--out", "."), "--out . is a directory; name the file"),
    _wrong("a negative number of episodes", ("report", "q", "--episodes", "-5"), "--episodes -5 must not be negative"),
    _wrong(
        "the list of evaluated episodes",
        ("show", "q", "--evaluation", "--task", "nosuch"),
        "`megatron-dagger show q --round 0 --evaluation --list`",
    ),
    Case(
        name="plan takes a GPU's name in capitals",
        argv=("plan", "qwen3_8b_swegym_8h100", "--gpu", "H100"),
        code=0,
        says=("8.19B parameters on 8 x h100", "slurm/single_node_with_teacher.sbatch"),
    ),
    Case(name="plan counts a small model in millions", argv=("plan", "quickstart"), code=0, says=("0.5M parameters",)),
    _wrong("an impossible worker", ("rollout", "q", "--round", "0", "--worker", "4/4"), "worker 4/4"),
)


def run_cases(cases: Sequence[Case] = CASES) -> dict[str, str]:
    """Run the cases; return the problems of those that failed, by the case's name."""
    return {case.name: problem for case in cases if (problem := problem_of(case))}
