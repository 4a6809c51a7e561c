"""Values that are kept as they come, through stops, full disks and a second process."""

import hashlib
import json
import random

import pytest

from lit_longctx import result_cache
from lit_longctx.result_cache import ResultCache


def test_a_value_is_on_the_disk_before_it_is_used(tmp_path, monkeypatch):
    path, flushed = tmp_path / "new" / "x.jsonl", []
    monkeypatch.setattr(result_cache.os, "fsync", lambda handle: flushed.append(path.read_bytes()))
    with ResultCache(path) as values:
        values.add({"a": 1}, [0.1, "\ud800 ü\n"])
        (line,) = flushed
        told = json.loads(line)
        begun = line.rpartition(b', "sha256": ')[0]
        assert told.pop("sha256") == hashlib.sha256(begun).hexdigest()[:16]
        assert told == {"of": {"a": 1}, "value": [0.1, "\ud800 ü\n"]}
        assert values[{"a": 1}] == [0.1, "\ud800 ü\n"]


def test_keys_do_not_depend_on_the_order_of_their_parts(tmp_path):
    with ResultCache(tmp_path / "x") as values:
        values.add({"b": 1, "a": "ü"}, 3.5)
    with ResultCache(tmp_path / "x") as values:
        assert {"a": "ü", "b": 1} in values
        assert values[{"a": "ü", "b": 1}] == 3.5
        assert {"a": "ü"} not in values


def test_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "x"
    with ResultCache(path) as values:
        for i in range(3):
            values.add({"a": i}, i)
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[-1])):
        path.write_bytes(whole[:-cut])
        with ResultCache(path) as values:
            assert [{"a": i} in values for i in range(3)] == [True, True, False]
            values.add({"a": 2}, 2)
        assert path.read_bytes() == whole


def test_a_value_that_the_disk_refuses_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "x"

    def refuse(_):
        raise OSError("disk full")

    with ResultCache(path) as values:
        values.add({"a": 1}, "1")
        with monkeypatch.context() as patch:
            patch.setattr(result_cache.os, "fsync", refuse)
            with pytest.raises(OSError, match="disk full"):
                values.add({"a": 2}, "2")
        values.add({"a": 3}, "3")
        assert {"a": 2} not in values
    found = [json.loads(line)["value"] for line in path.read_bytes().splitlines()]
    assert found == ["1", "3"]


def test_two_runs_cannot_keep_one_file(tmp_path):
    path = tmp_path / "x"
    with ResultCache(path), pytest.raises(ValueError, match="in use by another run; wait for it"):
        ResultCache(path)
    with ResultCache(path):
        pass


def test_an_altered_file_is_refused(tmp_path):
    (tmp_path / "x").write_text('{"of": {}, "value": 1}\n[]\n')
    with pytest.raises(ValueError, match=r"x is altered: line 2 holds no value, .* remove that"):
        ResultCache(tmp_path / "x")


def test_no_flipped_bit_changes_a_value(tmp_path):
    """Refused, or, where the last line loses its end, got anew as after a stop."""
    path = tmp_path / "x"
    with ResultCache(path) as values:
        for i in range(4):
            values.add({"task": "needle", "seed": i}, {"exact": 1.0, "nats": 0.1 + i})
        expected = dict(values.values)
    whole = path.read_bytes()
    for at in (*range(0, len(whole) - 1, 3), len(whole) - 1):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << random.Random(at).randrange(8)
        path.write_bytes(flipped)
        if at < len(whole) - 1:
            with pytest.raises(ValueError, match="is altered: line"):
                ResultCache(path)
        else:
            with ResultCache(path) as values:
                assert values.values.items() < expected.items()


def test_lines_of_older_versions_are_read(tmp_path):
    """Replies that were paid for, say; their files had no hashes."""
    (tmp_path / "x").write_text('{"of": {"a": 1}, "value": 2}\n')
    with ResultCache(tmp_path / "x") as values:
        assert values[{"a": 1}] == 2
