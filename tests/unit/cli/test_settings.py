"""Which settings of an existing run can be changed, and that a spent budget names the way out."""

import asyncio

import pytest

pytest.importorskip("httpx")

from megatron_dagger.cli.main import main
from megatron_dagger.config import to_dict
from megatron_dagger.config.run import CHANGEABLE
from megatron_dagger.driver.context import load_run_config
from megatron_dagger.policies.openai.cache import Reply, ResponseCache
from megatron_dagger.policies.openai.endpoint_pool import EndpointPool
from megatron_dagger.store.fence import claim

SETTINGS = ["teacher.urls=[http://x/v1]", "teacher.model=m", "teacher.token_budget=5"]


@pytest.fixture
def run(tmp_path):
    assert main(["create", str(tmp_path / "run"), "--recipe", "quickstart", *SETTINGS]) == 0
    return tmp_path / "run"


def test_a_budget_is_raised_and_the_scripts_that_began_the_run_go_on_working(run, capsys):
    assert main(["run", str(run), "teacher.token_budget=50", "--print"]) == 0
    assert "token_budget: 50" in capsys.readouterr().out
    assert load_run_config(run).teacher.token_budget == 5, "printing changes nothing"
    assert main(["create", str(run), "teacher.token_budget=50"]) == 0
    assert load_run_config(run).teacher.token_budget == 50
    assert main(["create", str(run), "--recipe", "quickstart", *SETTINGS]) == 0
    assert load_run_config(run).teacher.token_budget == 50


@pytest.mark.parametrize("setting", ["training.epochs=3", "teacher.urls=[]", "teacher.malformed_retries=9"])
def test_what_a_run_computes_cannot_be_changed(run, capsys, setting):
    before = (run / "config.yaml").read_bytes()
    for words in (["run", str(run), setting], ["create", str(run), setting]):
        assert main(words) == 2
        name = setting.partition("=")[0]
        assert f"error: {name}: what an existing run computes cannot be changed" in capsys.readouterr().err
    assert main(["create", str(run), "--recipe", "quickstart", *SETTINGS, setting]) == 2
    assert f"other settings ({name})" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before


def test_nothing_is_changed_under_a_process_that_works_on_the_run(run, capsys):
    with claim(run):
        assert main(["create", str(run), "teacher.token_budget=50"]) != 0
    assert "It works on this run" in capsys.readouterr().err
    assert load_run_config(run).teacher.token_budget == 5


def test_every_changeable_setting_is_one(run):
    config = load_run_config(run)
    for name in CHANGEABLE:
        node = to_dict(config)
        for part in name.split("."):
            node = node[part]


def test_a_spent_budget_names_the_way_out_and_not_the_same_command(run, capsys, monkeypatch):
    replies = ResponseCache(run / "teacher")
    replies.put("a", Reply(text="a", prompt_tokens=9))
    replies.close()

    def ask(arguments):
        replicas = EndpointPool(load_run_config(run).teacher, replies)
        asyncio.run(replicas.ask("chat/completions", {}, lambda url, body: body))

    monkeypatch.setattr("megatron_dagger.cli.main._recipes", ask)
    assert main(["recipes"]) == 1
    said = capsys.readouterr().err
    assert "`megatron-dagger run RUN teacher.token_budget=VALUE` goes on from here with more" in said
    assert "the same command" not in said
