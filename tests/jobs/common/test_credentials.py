"""Passwords and signatures in values, and what only looks like them."""

import pytest

from jobs.common.credentials import has_credentials, without_credentials


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("s3://key:secret@bucket/dir", "s3://bucket/dir"),
        ("https://b.s3/x?X-Amz-Signature=secret", "https://b.s3/x"),
        ("https://me:secret@b.s3/x?list=1&token=secret", "https://b.s3/x"),
        ("s3://bucket/x?region=us-west-2&access_key=secret", "s3://bucket/x"),
    ],
)
def test_what_is_secret_is_found_and_left_out(value: str, shown: str) -> None:
    assert has_credentials(value)
    assert without_credentials({"a": [value, 1]}) == {"a": [shown, 1]}


@pytest.mark.parametrize(
    "path",
    [
        "hf://datasets/allenai/c4@main/en/*.gz",
        "s3://bucket/part-??.jsonl",
        "abfs://container@account/x",
        "a?token=b@c",
    ],
)
def test_what_names_a_place_stays_as_it_is(path: str) -> None:
    assert not has_credentials(path)
    assert without_credentials({"paths": [path]}) == {"paths": [path]}
