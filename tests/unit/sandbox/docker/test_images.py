"""Names of images."""

import pytest

from megatron_dagger.sandbox.docker import images


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("a/b", ("a/b", "latest")),
        ("a/b:1", ("a/b", "1")),
        ("host:5000/a/b", ("host:5000/a/b", "latest")),
        ("host:5000/a/b:2", ("host:5000/a/b", "2")),
        ("a/b@sha256:12", ("a/b@sha256:12", None)),
    ],
)
def test_names_of_images(image, parts):
    assert images._name_and_tag(image) == parts
