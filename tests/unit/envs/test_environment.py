"""The defaults of an Environment: three fields make one."""

import pytest

from megatron_dagger.envs.base import truncate
from megatron_dagger.envs.environment import Environment, last_line
from megatron_dagger.policies.openai.cache import MalformedResponse, Response
from tests.unit.envs.guess_env import GuessEnv


def test_three_fields_make_an_environment(tmp_path):
    environment = Environment(train_tasks=("7", "9"), heldout_tasks=("3",), make_env=GuessEnv)
    environment.prefetch(environment.train_tasks)
    environment.prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert (environment.expert, environment.tokenizer_texts) == (None, None)
    with environment.make_env("7") as env:
        env.reset()
        assert env.step(environment.read(Response(text="Perhaps five.\n5"))).text == "higher"
        assert not env.judge()
        assert env.step("7").done
        assert env.judge()


def test_an_action_is_the_last_line_of_a_response():
    assert last_line(Response(text="I look first.\n\n  view @1 \n")) == "view @1"
    with pytest.raises(MalformedResponse, match="empty"):
        last_line(Response(text=" \n "))


def test_truncation_keeps_head_and_tail():
    assert truncate("abcdef", 6) == "abcdef"
    assert truncate("abcdef", 4) == "ab\n... 2 characters cut ...\nef"
