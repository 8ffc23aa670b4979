"""Control characters in untrusted text."""

from megatron_dagger.observability.sanitize import sanitize


def test_control_characters_become_visible_symbols() -> None:
    assert sanitize("a\tb\nc\r\nd é 漢") == "a\tb\nc\nd é 漢"
    assert sanitize("\x00\x1b\x7f\x85\ud800") == "␀␛␡\ufffd\ufffd"
