"""Passwords, tokens and signatures in URLs, wherever these stand, and what only looks like them."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.workflow.credentials import has_credentials, hide_credentials, shown_url, without_credentials

MARK = "s3cr3t"  # part of whatever is secret, twice where it may be cut
TOKEN = st.builds(lambda middle: f"{MARK}{middle}{MARK}", st.text("aZ09-_.~!$&*+=%", max_size=6))
PASSWORD = st.builds(lambda middle: f"{MARK}{middle}{MARK}", st.text("aZ09-_.~!$&*+=%:@/?#", max_size=6))
PATH = st.sampled_from(["", "/", "/dir/a.jsonl", "/a-b_c/part-0.parquet", "/x/*.gz"])
SCHEME = st.sampled_from(["https", "http", "HTTPS", "s3", "gs", "hf", "sftp", "postgresql+psycopg2", "memory", "abfs"])
HOST = st.sampled_from(["host", "bucket", "host.example:8080", "account.dfs.core.windows.net"])


def with_user(scheme: str, user: str, host: str, path: str) -> str:
    return f"{scheme}://{user}@{host}{path}"


USERS = st.builds(with_user, SCHEME, st.builds("me:{}".format, PASSWORD), HOST, PATH) | st.builds(
    with_user, SCHEME.filter(lambda name: name != "abfs"), TOKEN, HOST, PATH
)
OPTION = st.builds(
    "{}{}={}{}".format,
    st.sampled_from(["?", "#", "?list=1&", "#x=1&"]),
    st.sampled_from(["sig", "X-Amz-Signature", "access_key", "%73ig", "token", "Password"]),
    TOKEN,
    st.sampled_from(["", "&b=c"]),
)
OPTIONS = st.builds("{}://{}{}{}".format, SCHEME, HOST, PATH, OPTION)
BARE = st.builds("{}://host{}{}{}".format, st.sampled_from(["http", "https"]), PATH, st.sampled_from("?#"), TOKEN)
CHAIN = st.sampled_from(["", "", "simplecache::", "filecache::", "zip://inner.txt::", "zip://*.csv::simplecache::"])
CERTAIN = st.builds("{}{}".format, CHAIN, USERS | OPTIONS)  # what may not stand in a setting
ANY = CERTAIN | st.builds("{}{}".format, CHAIN, BARE)
AROUND = st.sampled_from(
    [
        "{}",
        "{} does not exist: check data.sources",
        "403 for <{}>.",
        "[{}]: refused (see {})",
        "line\n{}\n",
        "url_{}, and more",
        "wait 3::4: {}",
    ]
)
NO_URLS = st.text("ab:@/?#=&. %'\"\\\n").filter(lambda text: "://" not in text)


def written(url: str, around: str) -> list[str]:
    """A text with the URL in it, and as it stands in JSON, of whatever kind, and in what Python shows."""
    text = around.replace("{}", url)
    told = {"why": [text], "more": 1}
    return [text, json.dumps(told), json.dumps(told, separators=(",", ":")), repr(told), json.dumps(json.dumps(told))]


@given(ANY, AROUND)
def test_what_is_shown_holds_no_part_of_a_secret(url, around):
    for text in written(url, around):
        hidden = hide_credentials(text)
        assert MARK not in hidden
        assert hide_credentials(hidden) == hidden
    shown = shown_url(url)
    assert MARK not in shown
    assert shown_url(shown) == shown


@given(CERTAIN)
def test_a_setting_with_a_secret_is_found_and_names_its_place_without_it(url):
    assert has_credentials(url)
    (kept,) = without_credentials({"paths": [url]})["paths"]
    assert MARK not in kept
    assert not has_credentials(kept)


@given(CERTAIN)
def test_a_secret_in_a_setting_of_prose_is_found_too(url):
    text = f"taken from {url} yesterday"
    assert has_credentials(text)
    assert MARK not in without_credentials(text)


@given(st.text(max_size=30))
def test_scrubbing_twice_is_scrubbing_once(text):
    for url in (text, f"https://{text}", f"s3://b/{text}", f"abfs://{text}"):
        for scrub in (hide_credentials, shown_url, without_credentials):
            assert scrub(scrub(url)) == scrub(url)


@given(NO_URLS)
def test_what_is_no_url_stays_as_it_is(text):
    assert not has_credentials(text)
    if "with url: /" not in text:
        assert hide_credentials(text) == shown_url(text) == text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("s3://key:secret@bucket/dir", "s3://bucket/dir"),
        ("https://token@host/x.jsonl", "https://host/x.jsonl"),
        ("https://host/x.jsonl#sig=secret", "https://host/x.jsonl"),
        ("simplecache::s3://key:se/cr@et@bucket/dir", "simplecache::s3://bucket/dir"),
        ("abfs://key:secret@container/x", "abfs://container/x"),
        ("file://me:secret@host/x", "file://host/x"),
        ("https://b.s3/x?X-Amz-Signature=secret", "https://b.s3/x"),
        ("https://me:secret@b.s3/x?list=1&token=secret", "https://b.s3/x"),
        ("s3://bucket/x?region=us-west-2&access_key=secret", "s3://bucket/x"),
    ],
)
def test_what_is_secret_is_found_and_left_out(value: str, shown: str) -> None:
    assert has_credentials(value)
    assert without_credentials({"a": [value, 1]}) == {"a": [shown, 1]}
    assert shown_url(value) == shown
    assert hide_credentials(f"'{value}'") == f"'{shown}'"


@pytest.mark.parametrize(
    "path",
    [
        "hf://datasets/allenai/c4@main/en/*.gz",
        "s3://bucket/part-??.jsonl",
        "s3://bucket/year=20??/key=1/*.parquet",
        "s3://bucket/me@home/x",
        "abfs://container@account/x",
        "abfs://container@account.dfs.core.windows.net/a@b",
        "simplecache::abfs://container@account/x",
        "http://[::1]:5000/x",
        "a?token=b@c",
        "/data/me@home:x/what?#sig=1",
        "file:///data/me@home:x/what?#sig=1",
    ],
)
def test_what_names_a_place_stays_as_it_is(path: str) -> None:
    assert not has_credentials(path)
    assert without_credentials({"paths": [path]}) == {"paths": [path]}
    assert shown_url(path) == path
    assert hide_credentials(f"{path} does not exist") == f"{path} does not exist"


@pytest.mark.parametrize(
    "path",
    [
        "http://host:8080/a@b",
        "s3://bucket/x?region=us-west-2&endpoint_override=http://127.0.0.1:9000&scheme=http",
        "https://h/x?download=true",
    ],
)
def test_a_setting_keeps_what_only_might_be_secret(path: str) -> None:
    assert not has_credentials(path)
    assert shown_url(path) != path


def test_scrubbing_a_long_text_takes_no_time() -> None:
    for text in ("a" * 200_000, "a." * 100_000 + "://", "::" * 100_000, "https://" + "@:" * 100_000, "a::" * 70_000):
        assert len(hide_credentials(text)) + len(without_credentials(text)) + len(shown_url(text)) <= 3 * len(text)


def test_looking_for_credentials_loads_nothing_heavy() -> None:
    heavy = "{'pyarrow', 'numpy', 'ray', 'torch'}"
    script = f"import sys, pipelines.workflow.credentials\nprint({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"
