"""Calls that create, change and work on runs: which settings are refused, and what the messages say."""

from __future__ import annotations

from tools.check.cli_case import Case, right, wrong

NEW_RUN = ("run", "n", "--recipe", "short_repair")
CONTEXT_PARALLEL = ("training.parallel.context_parallel_size=2", "training.parallel.world_size=8")
SWE = ("swe.train=rows.jsonl", "swe.heldout=rows.jsonl", "teacher.urls=[http://x/v1]", "teacher.model=m")

RUN_CASES = (
    # a typo leaves no run directory behind
    wrong(
        "a missing checkpoint is refused before anything is written",
        (*NEW_RUN, "init_checkpoint=/nope"),
        "init_checkpoint=/nope: no such directory",
        absent=("n",),
    ),
    wrong(
        "an unknown package is refused before anything is written",
        (*NEW_RUN, "repo_repair.train_packages=[nosuchpackage]"),
        "repo_repair.train_packages",
        "nosuchpackage",
        absent=("n",),
    ),
    Case(
        name="a run without an episode can be created again with other settings",
        argv=("create", "m", "--recipe", "short_repair", "seed=2"),
        before=(("create", "m", "--recipe", "short_repair", "seed=1"),),
        code=0,
        says=("0 1 2",),
    ),
    # values that are not YAML
    wrong(
        "broken YAML in a setting is named",
        (*NEW_RUN, "dagger.rounds=["),
        "dagger.rounds='['",
        "not a YAML value",
        absent=("n",),
    ),
    wrong("a damaged config.yaml is named", ("show", "damaged"), "damaged/config.yaml is not a YAML file"),
    # the rules of the trainer and the planner are checked before round 0
    wrong(
        "trainer rules are checked first",
        (*NEW_RUN, *CONTEXT_PARALLEL),
        "training.parallel.context_parallel_size=2",
        absent=("n",),
    ),
    wrong(
        "trainer rules are checked in a dry run too",
        (*NEW_RUN, "--dry-run", *CONTEXT_PARALLEL),
        "training.parallel.context_parallel_size=2",
    ),
    wrong(
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
    wrong(
        "a checkpoint of another model is refused",
        ("create", "n", "--recipe", "short_repair", "init_checkpoint=checkpoint"),
        "is of another model: model.num_layers=36, not ",
        absent=("n",),
    ),
    wrong(
        "a dry run prints settings that are then refused",
        ("create", "n", "--recipe", "smollm2_135m_repair_1gpu", "--dry-run"),
        "family: llama",
        "no such directory",
        absent=("n",),
    ),
    # one way to name a recipe, and the usage of the right command
    right("plan takes --recipe", ("plan", "--recipe", "qwen3_8b_swegym_8h100"), "turns/s"),
    right("plan takes a run directory", ("plan", "q"), "note: q trains in fp32"),
    wrong("two recipes are refused", ("plan", "quickstart", "--recipe", "short_repair"), "name one recipe"),
    wrong(
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
    wrong(
        "a setting is found by its last name",
        (*NEW_RUN, "lr=1e-3"),
        "unknown setting lr; did you mean training.optimizer.lr?",
        absent=("n",),
    ),
    wrong(
        "a misspelt setting is suggested with its whole name",
        (*NEW_RUN, "dagger.round=1"),
        "did you mean dagger.rounds?",
    ),
    wrong(
        "a setting without = has the command's own usage",
        (*NEW_RUN, "training.optimizer.lr", "1e-3"),
        "usage: megatron-dagger run",
        "'training.optimizer.lr' is not a setting: write NAME=VALUE",
    ),
    wrong(
        "a setting with dashes is explained",
        (*NEW_RUN, "--training.optimizer.lr=1e-3"),
        "usage: megatron-dagger run",
        "settings are NAME=VALUE, without dashes: training.optimizer.lr=1e-3",
    ),
    wrong("a stray word has the command's own usage", ("show", "q", "1"), "usage: megatron-dagger show", ": 1"),
    wrong("a misspelt option is suggested", ("show", "q", "--rounds", "1"), "did you mean --round?"),
    wrong("an option of another command", ("train", "q", "--worker", "0/2"), "usage: megatron-dagger train"),
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
        argv=("create", "q", "--recipe", "short_repair", "dagger.rounds=2"),
        before=(("create", "q", "dagger.rounds=4"),),
        code=0,
        settings=("  rounds: 4",),
    ),
    Case(
        name="a group of settings changes an existing run",
        argv=("create", "q", "--recipe", "short_repair", "dagger={rounds: 4}"),
        code=0,
        settings=("  rounds: 4",),
    ),
    wrong("rounds cannot be lowered", ("create", "q", "dagger.rounds=1"), "dagger.rounds"),
    Case(
        name="a changed budget of a repeated command wins",
        argv=("create", "q", "--recipe", "short_repair", "teacher.token_budget=9"),
        code=0,
        settings=("  token_budget: 9",),
    ),
    Case(
        name="an old script does not lower a raised budget",
        argv=("create", "b", "--recipe", "short_repair", "teacher.token_budget=5"),
        before=(
            ("create", "b", "--recipe", "short_repair", "teacher.token_budget=5"),
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
        says=("q was created by recipe short_repair and has other settings", "more)"),
    ),
    # rounds
    wrong("evaluate beyond the run", ("evaluate", "q", "--round", "7"), "round 7: this run has rounds 0 to 2"),
    wrong("rollout beyond the run", ("rollout", "q", "--round", "3"), "round 3: this run has rounds 0 to 2"),
    wrong("train beyond the run", ("train", "q", "--round", "-1"), "round -1: this run has rounds 0 to 2"),
    wrong(
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
    right(
        "old names of settings are read",
        ("create", "n", "--recipe", "short_repair", "--dry-run", "swe.admission=report.json"),
        "validation: report.json",
    ),
    wrong(
        "a mapping in place of a value",
        ("create", "n", "--recipe", "short_repair", "seed={a: 1}"),
        "seed: expected int",
    ),
    wrong("an unknown recipe", ("create", "n", "--recipe", "quikstart"), "did you mean quickstart?"),
    Case(
        name="an unknown recipe of the launcher is one line",
        argv=("config=quikstart", "directory=x"),
        code=1,
        says=("error: unknown recipe 'quikstart'; did you mean quickstart?",),
        never_says=("Traceback", "Failed to parse"),
        launcher=True,
    ),
)
