"""The store returns every committed episode exactly once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dagger.store import arrays, columns, segments
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.store.atomic import read_json, write_json
from megatron_dagger.store.errors import BrokenEpisodeError, CorruptDataError, SealedRoundError, StoreError
from megatron_dagger.types import StopReason, Trajectory
from tests.support.trajectories import make_trajectory, make_turn, random_trajectory, same_trajectory, trajectories


@pytest.fixture
def store(tmp_path: Path) -> DataStore:
    return DataStore.create_or_open(tmp_path / "data.zarr")


def episodes_of(count: int, round_index: int = 0, seed: int = 0) -> list[Trajectory]:
    return [random_trajectory(seed, f"task-{i:03d}", round_index=round_index, turns=3) for i in range(count)]


def test_the_store_imports_without_zarr() -> None:
    code = (
        "import sys; sys.modules['zarr'] = None; import megatron_dagger.store.aggregated as a, tempfile;"
        "s = a.DataStore.create_or_open(tempfile.mkdtemp() + '/d.zarr'); assert s.rounds() == []"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_appended_episodes_are_read_back_exactly(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    store = DataStore.create_or_open(tmp_path_factory.mktemp("s") / "data.zarr")
    batches = data.draw(st.lists(st.lists(trajectories(round_index=2), max_size=3), min_size=1, max_size=3))
    expected: dict[tuple[str, int], Trajectory] = {}
    for batch in batches:
        new = store.append(batch)
        before = set(expected)
        for trajectory in batch:
            expected.setdefault((trajectory.task_id, trajectory.attempt), trajectory)
        assert {key[1:] for key in new} == set(expected) - before
    if not expected:
        assert store.rounds() == []
        return

    def check(reader: DataStore) -> None:
        assert reader.committed(2) == set(expected)
        episodes = list(reader.episodes(2))
        assert [(t.task_id, t.attempt) for t in episodes] == sorted(expected)
        assert all(same_trajectory(t, expected[t.task_id, t.attempt]) for t in episodes)
        assert all(same_trajectory(reader.read(2, key), expected[key]) for key in expected)

    check(store)
    manifest = store.seal(2)
    assert manifest.episodes == len(expected)
    assert manifest.turns == sum(len(t.turns) for t in expected.values())
    assert manifest.labelled_turns == sum(u.label is not None for t in expected.values() for u in t.turns)
    assert manifest.label_tokens == sum(len(u.label.tokens) for t in expected.values() for u in t.turns if u.label)
    check(store)
    check(DataStore.open(store.path))
    assert store.verify() == {2: len(expected)}


def test_a_round_spans_many_chunks_and_shards(store: DataStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "DEFAULT_CHUNK_ROWS", 100)
    monkeypatch.setattr(segments, "CHUNK_ROWS", {})
    monkeypatch.setattr(segments, "CHUNKS_PER_SHARD", 3)
    episodes = episodes_of(12)
    store.append(episodes)
    store.seal(0)
    chunks = list((store.path / "rounds/0000/episodes/tokens/c").iterdir())
    assert len(chunks) > 4
    reader = segments.SealedEpisodes(store.path / "rounds/0000/episodes")
    assert len(reader.blocks(0, bytes_per_block=5000)) > 3
    monkeypatch.setattr(segments.SealedEpisodes.blocks, "__defaults__", (5000,))
    read = list(DataStore.open(store.path).episodes(0))
    assert all(same_trajectory(a, b) for a, b in zip(read, episodes, strict=True))
    assert store.verify() == {0: 12}


def test_plain_zarr_reads_the_compressed_shards(store: DataStore) -> None:
    import zarr

    store.append(episodes_of(20, round_index=3))
    manifest = store.seal(3)
    root = zarr.open_group(store.path, mode="r")
    assert root.metadata.zarr_format == 3
    round_group = root["rounds/0003"]
    assert isinstance(round_group, zarr.Group)
    assert round_group.attrs["manifest"] == manifest.to_dict()
    tokens = root["rounds/0003/episodes/tokens"]
    assert isinstance(tokens, zarr.Array)
    assert tokens.shape == (manifest.tokens,)
    assert tokens.shards is not None
    names = [type(codec).__name__ for codec in tokens.metadata.codecs[0].codecs]
    assert names == ["BytesCodec", "ZstdCodec", "Crc32cCodec"]
    labels = root["rounds/0003/episodes/label_tokens"]
    assert isinstance(labels, zarr.Array)
    assert labels.shape == (manifest.label_tokens,)


def test_content_does_not_depend_on_the_order_of_arrival(tmp_path: Path) -> None:
    episodes = episodes_of(6)
    first = DataStore.create_or_open(tmp_path / "first.zarr")
    for trajectory in episodes:
        first.append([trajectory])
    other = DataStore.create_or_open(tmp_path / "other.zarr", writer="w7")
    other.append(episodes[:2:-1])
    other.append(episodes[2::-1])
    assert first.seal(0) == other.seal(0)
    assert first.digest() == other.digest()
    for path in sorted((first.path / "rounds/0000/episodes").rglob("*")):
        twin = other.path / path.relative_to(first.path)
        assert path.is_dir() or path.read_bytes() == twin.read_bytes()


def test_the_digest_covers_exactly_the_reproducible_content(tmp_path: Path) -> None:
    base = make_trajectory()
    turn = base.turns[1]

    def digest(name: str, trajectory: Trajectory) -> str:
        store = DataStore.create_or_open(tmp_path / f"{name}.zarr")
        store.append([trajectory])
        return store.seal(0).digest

    def with_turn(changed: object) -> Trajectory:
        return replace(base, turns=(base.turns[0], changed))

    logprobs = replace(turn.action, logprobs=turn.action.logprobs - 1)
    same = [
        replace(base, duration_s=9.0, details={}, beta=0.1),
        with_turn(replace(turn, action=logprobs)),
        with_turn(replace(turn, action=replace(turn.action, weight_version=9))),
    ]
    different = [
        replace(base, solved=False),
        replace(base, stop_reason=StopReason.TURN_LIMIT),
        replace(base, task_id="other"),
        replace(base, attempt=1),
        with_turn(replace(turn, acted_by="teacher")),
        with_turn(replace(turn, label=None)),
        with_turn(make_turn([7], [8, 10])),
        with_turn(make_turn([6], [8, 9])),
        with_turn(make_turn([7], [8, 9], prompt=(1, 3))),
        replace(base, turns=base.turns[:1]),
    ]
    expected = digest("base", base)
    assert [digest(f"same{i}", t) for i, t in enumerate(same)] == [expected] * len(same)
    digests = [digest(f"different{i}", t) for i, t in enumerate(different)]
    assert expected not in digests
    assert len(set(digests)) == len(digests)


def test_a_second_commit_of_an_episode_is_ignored(store: DataStore) -> None:
    first, second = make_trajectory("a", solved=True), make_trajectory("a", solved=False)
    assert store.append([first, second]) == [(0, "a", 0)]
    other = DataStore.open(store.path, writer="other")
    assert other.append([second, make_trajectory("b")]) == [(0, "b", 0)]
    assert other.append([second]) == []
    assert [t.solved for t in store.episodes(0)] == [True, True]
    assert store.seal(0).episodes == 2


def test_broken_episodes_never_become_data(store: DataStore) -> None:
    broken = make_trajectory("b", stop_reason=StopReason.ENVIRONMENT_ERROR)
    with pytest.raises(BrokenEpisodeError, match="'b'"):
        store.append([make_trajectory("a"), broken])
    assert store.rounds() == []
    assert store.committed(0) == set()


def test_a_sealed_round_is_read_only_and_sealing_again_changes_nothing(store: DataStore) -> None:
    store.append(episodes_of(2))
    manifest = store.seal(0)
    before = {p: p.read_bytes() for p in store.path.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(SealedRoundError, match=r"0000.*sealed"):
        store.append(episodes_of(3))
    assert store.seal(0) == manifest
    assert before == {p: p.read_bytes() for p in store.path.rglob("*") if p.is_file() and p.name != ".lock"}
    assert not (store.path / "rounds/0000/segments").exists()


def test_rounds_are_independent(store: DataStore) -> None:
    store.append(episodes_of(2, round_index=0) + episodes_of(3, round_index=5))
    assert store.rounds() == [0, 5]
    empty = store.digest()
    store.seal(0)
    assert store.sealed() == [0]
    sealed = store.digest()
    store.append(episodes_of(4, round_index=5))
    assert store.digest() == sealed != empty  # only sealed rounds count
    store.seal(5)
    assert store.digest() != sealed
    assert [len(store.committed(r)) for r in (0, 1, 5)] == [2, 0, 4]


def test_a_reader_continues_when_the_round_is_sealed_meanwhile(store: DataStore) -> None:
    for trajectory in episodes_of(6):
        store.append([trajectory])
    reader = DataStore.open(store.path)
    iterator = reader.episodes(0)
    read = [next(iterator), next(iterator)]
    store.seal(0)
    read += list(iterator)
    assert all(same_trajectory(a, b) for a, b in zip(read, episodes_of(6), strict=True))
    assert same_trajectory(reader.read(0, ("task-004", 0)), episodes_of(6)[4])


def test_errors_name_their_cause(store: DataStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="round 4 has no committed episode"):
        store.seal(4)
    with pytest.raises(StoreError, match="no episode 'nobody'"):
        store.read(0, ("nobody", 0))
    with pytest.raises(StoreError, match="count from 0"):
        store.committed(-1)
    with pytest.raises(StoreError, match=r"writer '\.\./x'"):
        DataStore.create_or_open(tmp_path / "w.zarr", writer="../x")
    with pytest.raises(StoreError, match=r"nothing\.zarr: there is no data store"):
        DataStore.open(tmp_path / "nothing.zarr")
    metadata = read_json(store.path / "zarr.json")
    metadata["attributes"]["schema_version"] = 99
    write_json(store.path / "zarr.json", metadata)
    with pytest.raises(StoreError, match="schema version 99, but this program reads 1"):
        DataStore.open(store.path)


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


DAMAGES = {"flip": _flip, "shorten": _shorten, "remove": Path.unlink, "empty": lambda p: p.write_bytes(b"")}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_chunk_is_found_and_named(store: DataStore, damage: str) -> None:
    store.append(episodes_of(3))
    [segment] = (store.path / "rounds/0000/segments").glob("driver-*")
    kept = segment.with_name("kept")
    shutil.copytree(segment, kept)
    DAMAGES[damage](segment / "c/0")
    with pytest.raises(CorruptDataError, match=r"segments/driver-000000/c/0: "):
        list(store.episodes(0))
    with pytest.raises(CorruptDataError, match=r"segments/driver-000000/c/0: "):
        store.seal(0)
    assert store.manifest(0) is None
    shutil.rmtree(segment)
    kept.rename(segment)
    store.seal(0)
    for name in segments.LAYOUT.keys() - columns.OPTIONAL:
        [chunk] = [p for p in (store.path / "rounds/0000/episodes" / name / "c").rglob("*") if p.is_file()]
        content = chunk.read_bytes()
        DAMAGES[damage](chunk)
        fresh = DataStore.open(store.path)
        with pytest.raises(CorruptDataError, match=rf"episodes/{name}/c/[0/]+: "):
            list(fresh.episodes(0))
        with pytest.raises(CorruptDataError, match=rf"episodes/{name}/c/[0/]+: "):
            store.verify()
        chunk.write_bytes(content)
    assert store.verify() == {0: 3}


def test_damaged_metadata_is_named(store: DataStore) -> None:
    store.append(episodes_of(2))
    store.seal(0)
    folder = store.path / "rounds/0000"
    for name in ("zarr.json", "episodes/zarr.json", "episodes/tokens/zarr.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(CorruptDataError, match=rf"rounds/0000/{name}"):
            list(DataStore.open(store.path).episodes(0))
        (folder / name).write_bytes(content)


def test_verify_finds_valid_chunks_with_other_content(store: DataStore) -> None:
    store.append(episodes_of(2))
    store.seal(0)
    path = store.path / "rounds/0000/episodes/tokens"
    tokens = arrays.read_rows(path, arrays.open_array(path)).copy()
    tokens[3] += 1
    shutil.rmtree(path)
    arrays.write_array(path, tokens, chunk_rows=64)
    with pytest.raises(CorruptDataError, match=r"rounds/0000/episodes.*not what was sealed"):
        store.verify()


@pytest.mark.parametrize("scored", [False, True])
def test_teacher_log_probs_are_stored_and_without_them_the_format_is_unchanged(tmp_path, scored):
    turn = replace(make_turn([1, 2], [3]), teacher_logprobs=np.float32([-0.5, -1.5]) if scored else None)
    episodes = [make_trajectory("a", turns=(turn,)), make_trajectory("b")]
    store = DataStore.create_or_open(tmp_path / "data.zarr")
    for episode in episodes:
        store.append([episode])
    for stage in ("open", "sealed"):
        assert all(map(same_trajectory, store.episodes(0), episodes)), stage
        digest = store.seal(0).digest
    assert (tmp_path / "data.zarr/rounds/0000/episodes/teacher_logprobs").is_dir() is scored
    assert store.verify() == {0: 2}
    assert digest == sealed_digest_of(tmp_path / "other", episodes), "the digest does not cover them"


def sealed_digest_of(path, episodes):
    store = DataStore.create_or_open(path)
    store.append([replace(e, turns=tuple(replace(t, teacher_logprobs=None) for t in e.turns)) for e in episodes])
    return store.seal(0).digest
