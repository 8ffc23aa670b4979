"""The settings reference in recipes/README.md is complete and up to date."""

from megatron_dagger.config import RunConfig, to_dict
from tools.settings_reference import BEGIN, END, README, reference, with_reference


def test_the_reference_is_up_to_date():
    text = README.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert with_reference(text) == text, "run python -m tools.settings_reference"


def test_every_setting_is_listed_under_its_group():
    listed, group = set(), ""
    for line in reference():
        if line.startswith("### "):
            group = "" if line == "### top level" else line.removeprefix("### ") + "."
        elif line.startswith("| `"):
            listed.add(group + line.split("`")[1])

    def names(values, prefix=""):
        for name, value in values.items():
            yield from names(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]

    assert set(names(to_dict(RunConfig()))) <= listed
    assert "model.yarn.factor" in listed
