import hashlib

from pipelines.workflow.hashing import hash_file, hash_json


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_a_json_hash_knows_values_and_not_the_order_of_keys():
    assert hash_json({"a": 1, "b": [1, 2]}) == hash_json({"b": [1, 2], "a": 1})
    different = [{"a": 1, "b": [1, 2]}, {"a": 1, "b": [2, 1]}, {"a": "1", "b": [1, 2]}, {"a": 1.5}, {"a": None}, {}, []]
    assert len({hash_json(value) for value in different}) == len(different)


def test_a_file_hash_is_the_sha256_of_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"content\0" * 100_000)
    assert hash_file(tmp_path / "file") == sha256(b"content\0" * 100_000)
