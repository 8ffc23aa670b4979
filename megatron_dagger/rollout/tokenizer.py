"""A small tokenizer of Qwen's kind, for students that start from random weights.

Byte-level BPE with Qwen's pre-tokenization and control tokens, trained on given texts. The same texts give the
same tokenizer. A student that starts from a checkpoint keeps that model's tokenizer (``take_tokenizer``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_dagger.config import ConfigError
from megatron_dagger.rollout.chat import END, END_OF_TEXT, START
from megatron_dagger.store.atomic import write_json, write_text
from megatron_dagger.weights.companions import copy_companions
from megatron_dagger.weights.errors import CheckpointReadError

# Qwen2's and Qwen3's pattern (pre_tokenizer in the tokenizer.json of Qwen/Qwen3-8B).
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '" + START + "' + message['role'] + '\\n' + message['content'] + '" + END + "' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + START + "assistant\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a tokenizer on ``texts``, and write its tokenizer.json and tokenizer_config.json to ``folder``."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "chat_template": CHAT_TEMPLATE,
    }
    write_text(folder / "tokenizer.json", json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False))
    write_json(folder / "tokenizer_config.json", settings)


def control_ids(folder: Path) -> dict[str, int | None]:
    """Return the ids that end and pad a sequence, as a config.json has them, of a tokenizer that was trained here."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return {"eos_token_id": tokenizer.token_to_id(END), "pad_token_id": tokenizer.token_to_id(END_OF_TEXT)}


def take_tokenizer(source: Path, folder: Path) -> None:
    """Copy a converted checkpoint's tokenizer and other small files from ``source``, its HF_FILES.

    Raises ConfigError if it has no tokenizer, or only a pointer to one.
    """
    if not (source / "tokenizer.json").is_file():
        raise ConfigError(
            f"init_checkpoint: {source}/tokenizer.json is missing; make the checkpoint with "
            "`megatron-dagger convert hf-to-megatron` from a model directory that contains its tokenizer"
        )
    try:
        copy_companions(source, folder)
    except CheckpointReadError as error:
        raise ConfigError(f"init_checkpoint: {error}") from error
