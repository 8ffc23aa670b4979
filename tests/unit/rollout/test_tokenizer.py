"""Tokenizers: trained deterministically, with control tokens and a chat template in Qwen's format, or copied."""

import json

import pytest

from megatron_dagger.config import ConfigError
from megatron_dagger.rollout.tokenizer import take_tokenizer, train_tokenizer

TEXTS = ["view @1", "edit @2 if 'if not'", "def f(a, b):\n    return a + b"] * 9
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_the_same_texts_give_the_same_tokenizer(tmp_path):
    for name in ("first", "second"):
        train_tokenizer(TEXTS, 400, tmp_path / name)
    assert (tmp_path / "first/tokenizer.json").read_bytes() == (tmp_path / "second/tokenizer.json").read_bytes()


def test_control_tokens_come_first_and_the_chat_template_is_qwens(tmp_path):
    train_tokenizer(TEXTS, 400, tmp_path)
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    assert [token["content"] for token in added] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (settings["eos_token"], settings["chat_template"]) == ("<|im_end|>", TEMPLATE)


def test_a_checkpoints_tokenizer_is_copied_or_its_absence_named(tmp_path):
    train_tokenizer(TEXTS, 400, tmp_path / "hf")
    take_tokenizer(tmp_path / "hf", tmp_path / "student")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "student" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing; make the checkpoint with"):
        take_tokenizer(tmp_path / "nowhere", tmp_path / "student")
