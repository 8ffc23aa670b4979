"""What a model's own chat template writes at the start of a reply that is not to think."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_dagger.config import ConfigError

_HEADER = "assistant\n"
_SWITCH = "enable_thinking"  # the templates' variable, as Qwen3's


def reply_prefix(model_dir: Path) -> str:
    """Return the text between a reply's header and the reply, with thinking off; "" for a template without the switch.

    A hybrid model such as Qwen3-8B answers at once after an empty thinking block and thinks without it. Raises
    ConfigError for a template that cannot be rendered.
    """
    template = _template(model_dir)
    if _SWITCH not in template:
        return ""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # a template is code from whoever made the model

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    messages = [{"role": "user", "content": "question"}]
    try:
        text = environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, **{_SWITCH: False}
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise ConfigError(f"{model_dir}: its chat template cannot be rendered: {error}") from error
    return text.rpartition(_HEADER)[2]


def _template(model_dir: Path) -> str:
    """Return the chat template of a model directory, from either of the files that may hold it; "" without one."""
    own, settings = model_dir / "chat_template.jinja", model_dir / "tokenizer_config.json"
    if own.is_file():
        return own.read_text()
    template = json.loads(settings.read_text()).get("chat_template") if settings.is_file() else None
    if isinstance(template, list):  # several templates by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template or ""
