"""Qwen's chat format: the only place where text becomes tokens, for rollouts and for training.

A conversation is only ever extended. The tokens a policy produced stay as they are; later messages are encoded
separately and appended. No text is tokenized a second time.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_dagger.config.base import require
from megatron_dagger.rollout.reply_prefix import reply_prefix

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


class ChatRenderer:
    """Encodes messages around the turns of an episode. All token arrays are (n,) int32.

    ``reply_prefix`` is text that follows the header of each reply (``reply_prefix.py``).
    """

    def __init__(self, tokenizer: Tokenizer, reply_prefix: str = ""):
        self._tokenizer = tokenizer
        self._reply_opening = f"assistant\n{reply_prefix}"
        # Text from tasks and sandboxes must never become control tokens.
        tokenizer.encode_special_tokens = True
        # A training script's settings, which tokenizer.json keeps, would cut texts or fill them up.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._start, self.end_token = (self._special(name) for name in (START, END))
        self._control = {self._start, self.end_token, self._special(END_OF_TEXT)}

    @classmethod
    def load(cls, model_dir: Path) -> ChatRenderer:
        """Load the tokenizer.json of a model directory, and its reply prefix.

        Raises FileNotFoundError without a tokenizer.json, and ConfigError for a chat template that cannot be rendered.
        """
        from tokenizers import Tokenizer

        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {model_dir} must be a model directory")
        return cls(Tokenizer.from_file(str(path)), reply_prefix(model_dir))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ConfigError if the tokenizer has an id that a model with ``vocab_size`` embeddings lacks."""
        last = max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        require(
            last < vocab_size,
            f"the tokenizer has ids up to {last}, and model.vocab_size={vocab_size}: resize the embedding to the "
            "tokenizer, or use the tokenizer that the model was made with",
        )

    def opening(self, system: str, task: str) -> np.ndarray:
        """Return the first prompt: the system and task messages, and the header of the first reply."""
        parts = [self._message("system", system), self._text("\n"), self._message("user", task)]
        return np.concatenate([*parts, self._reply_header()])

    def action(self, text: str) -> np.ndarray:
        """Encode a reply the student did not sample: its text and the end-of-turn token."""
        return np.append(self._text(text), np.int32(self.end_token))

    def observation(self, text: str, after: np.ndarray) -> np.ndarray:
        """Encode the observation and the next reply's header, which follow the action tokens ``after``.

        If the reply was cut off, the missing end-of-turn token comes first.
        """
        closed = len(after) > 0 and after[-1] == self.end_token
        ending = [] if closed else [np.array([self.end_token], np.int32)]
        return np.concatenate([*ending, self._text("\n"), self._message("user", text), self._reply_header()])

    def reply_text(self, tokens: np.ndarray) -> str | None:
        """Return the text of a sampled reply, or None if it was cut off or contains control tokens."""
        if len(tokens) == 0 or tokens[-1] != self.end_token:
            return None
        body = [int(token) for token in tokens[:-1]]
        return None if self._control.intersection(body) else self._tokenizer.decode(body)

    def text(self, tokens: np.ndarray) -> str:
        """Decode any tokens, with control tokens shown."""
        return str(self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False))

    def _message(self, role: str, content: str) -> np.ndarray:
        body = self._text(f"{role}\n{content}")
        return np.concatenate([[self._start], body, [self.end_token]]).astype(np.int32)

    def _reply_header(self) -> np.ndarray:
        return np.concatenate([self._text("\n"), [self._start], self._text(self._reply_opening)]).astype(np.int32)

    def _text(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def _special(self, name: str) -> int:
        token = self._tokenizer.token_to_id(name)
        if token is None:
            raise ValueError(f"the tokenizer has no token {name}; it must be a tokenizer of the Qwen family")
        return int(token)
