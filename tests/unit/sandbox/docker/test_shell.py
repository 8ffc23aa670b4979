"""The frames of a container's output."""

from megatron_dagger.sandbox.docker import shell as container_shell


def test_frames_are_cut_where_they_end():
    frame = b"\x01\0\0\0\0\0\0\x03abc"
    assert container_shell._frames(frame + frame[:9]) == (b"abc", frame[:9])
    assert container_shell._frames(frame * 2) == (b"abcabc", b"")
    assert container_shell._frames(b"\x01\0") == (b"", b"\x01\0")
