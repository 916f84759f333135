"""The gate: what passes, what does not, and that it says why."""

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.config.registry import Condition, Registry, RunsPlace
from jobs.config.settings import validated
from jobs.registry.gate import decide, metrics_by_name, passkey_length
from pipelines.workflow.credentials import hide_credentials
from pipelines.workflow.errors import UserError

METRICS = {
    "perplexity/model": {512: 10.05, 2048: 9.5},
    "perplexity/base": {512: 10.0},
    "passkey/exact": {512: 1.0, 65536: 0.95},
    "bits": {0: 1.5},
    "endless": {0: math.inf},
    "lost": {512: math.nan},
}


def condition(**values: object) -> Condition:
    return Condition.model_validate(values)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            {"metric": "passkey/exact", "at": 65536, "least": 0.9},
            "pass: passkey/exact at 65536 is 0.95, wanted at least 0.9",
        ),
        (
            {"metric": "passkey/exact", "at": 65536, "least": 0.96},
            "fail: passkey/exact at 65536 is 0.95, wanted at least 0.96",
        ),
        ({"metric": "perplexity/model", "most": 9.5}, "pass: perplexity/model is 9.5, wanted at most 9.5"),
        (
            {"metric": "perplexity/model", "at": 512, "most": 9.5},
            "fail: perplexity/model at 512 is 10.05, wanted at most 9.5",
        ),
        (
            {"metric": "perplexity/model", "at": 512, "of": "perplexity/base", "within": 0.01},
            "pass: perplexity/model at 512 is 10.05, wanted at most 10.1: perplexity/base (10) and 1 %",
        ),
        (
            {"metric": "perplexity/model", "at": 512, "of": "perplexity/base", "within": 0.001},
            "fail: perplexity/model at 512 is 10.05, wanted at most 10.01: perplexity/base (10) and 0.1 %",
        ),
        (
            {"metric": "passkey/exact", "at": 1024, "least": 0.5},
            "fail: passkey/exact was not measured at 1024 (but at 512, 65536)",
        ),
        (
            {"metric": "perplexity/modle", "most": 12},
            "fail: perplexity/modle was not measured (nearest: perplexity/model, perplexity/base)",
        ),
        (
            {"metric": "perplexity/model", "at": 2048, "of": "perplexity/base", "within": 0.01},
            "fail: perplexity/base was not measured at 2048 (but at 512)",
        ),
        (
            {"metric": "bits", "of": "endless", "within": 0.01},
            "fail: endless is inf, no finite number",
        ),
        ({"metric": "lost", "at": 512, "of": "bits", "within": 0.01}, "fail: lost at 512 is nan, no finite number"),
    ],
)
def test_a_condition_says_what_was_measured_and_what_was_wanted(values: dict, reason: str) -> None:
    decision = decide([condition(**values)], METRICS)
    assert decision.reasons == (reason,)
    assert decision.promote == reason.startswith("pass")


def test_all_conditions_must_hold_and_each_has_its_line() -> None:
    good, bad = condition(metric="bits", most=2.0), condition(metric="bits", most=1.0)
    assert decide([good, good], METRICS).promote
    decision = decide([good, bad, good], METRICS)
    assert not decision.promote
    assert [reason[:4] for reason in decision.reasons] == ["pass", "fail", "pass"]


def test_without_conditions_nothing_is_promoted_and_the_reason_says_so() -> None:
    decision = decide([], METRICS)
    assert not decision.promote
    assert "no registry.promote" in decision.reasons[0]


@given(st.floats(), st.floats(allow_nan=False, allow_infinity=False))
def test_only_a_finite_number_on_the_right_side_passes(value: float, limit: float) -> None:
    metrics, finite = {"m": {1: value}}, math.isfinite(value)
    assert decide([condition(metric="m", least=limit)], metrics).promote == (finite and value >= limit)
    assert decide([condition(metric="m", most=limit)], metrics).promote == (finite and value <= limit)


@given(st.floats(), st.sampled_from([math.inf, -math.inf, math.nan]))
def test_nothing_passes_beside_what_is_no_number(value: float, other: float) -> None:
    beside = condition(metric="m", of="n", within=0.5)
    assert not decide([beside], {"m": {1: value}, "n": {1: other}}).promote
    assert not decide([beside], {"m": {1: other}, "n": {1: value}}).promote


@pytest.mark.parametrize(
    ("exact", "longest"),
    [
        ({512: 1.0, 1024: 0.9, 2048: 0.89, 4096: 1.0}, 1024),
        ({2048: 0.95, 512: 1.0}, 2048),
        ({512: 0.5, 1024: 1.0}, 0),
        ({512: math.nan}, 0),
        ({}, None),
    ],
)
def test_the_passkey_length_ends_before_the_first_length_that_fails(exact: dict, longest: int | None) -> None:
    assert passkey_length({"passkey/exact": exact}) == longest


def test_points_become_metrics_by_name_and_step() -> None:
    points = [("a", 1.0, 512, 0.0), ("a", 2.0, 1024, 0.0), ("b", 3.0, 512, 0.0)]
    assert metrics_by_name(points) == {"a": {512: 1.0, 1024: 2.0}, "b": {512: 3.0}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metric": "m"}, "give one of least, most, or of with within"),
        ({"metric": "m", "least": 1, "most": 2}, "give one of least, most, or of with within"),
        ({"metric": "m", "of": "n"}, "`of` (a metric) and `within` (a share) go together"),
        ({"metric": "m", "within": 0.1}, "`of` (a metric) and `within` (a share) go together"),
        ({"metric": "m", "least": 1, "of": "n", "within": 0.1}, "give one of least"),
        ({"metric": "m", "at": 0, "least": 1}, "greater than 0"),
        ({"metric": "m", "least": math.nan}, "finite"),
        ({"metric": "m", "atleast": 1}, "Extra inputs"),
    ],
)
def test_a_condition_says_one_thing_only(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        condition(**values)


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:5000",
        "https://me:secret@host/mlflow",
        "sqlite:////data/mlflow.db",
        "postgresql://me:secret@host/runs",
        "mysql+pymysql://host/runs",
    ],
)
def test_addresses_of_servers_and_databases_are_taken_and_dumped_without_credentials(uri: str) -> None:
    registry = Registry(tracking_uri=uri)
    assert registry.tracking_uri == uri
    assert registry.model_dump(mode="json")["tracking_uri"] == uri.replace("me:secret@", "")


@pytest.mark.parametrize(
    "uri",
    [
        "host:5000",
        "ftp://me:secret@host",
        "file:///runs",
        "sqlite:///runs.db",
        "http://",
        "http://me:secret@host:x",
        "",
    ],
)
def test_other_addresses_are_refused_without_showing_credentials(uri: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Registry(tracking_uri=uri)
    assert "secret" not in refused.value.errors()[0]["msg"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://me:se@cret@host:1/x now", "at http://host:1/x now"),
        ("at http://me:se/cr@et@host:1/x now", "at http://host:1/x now"),
        ("postgresql://host/x?user=a&password=secret&b=c", "postgresql://host/x"),
        ("mssql+pyodbc:///?odbc_connect=DRIVER;PWD=secret", "mssql+pyodbc:///"),
        ("postgresql://host/x?password=sec@ret and", "postgresql:// and"),
        ("http://me:sec?ret@host", "http://"),
        ("sqlite:////me@work/what?/mlflow.db", "sqlite:////me@work/what?/mlflow.db"),
        ("nothing: to hide @ all", "nothing: to hide @ all"),
        ('["http://host/x?sig=secret"]', '["http://host/x"]'),
        ('["http://host?sig=secret","and more"]', '["http://host","and more"]'),
        ("('http://me:secret@host', 1)", "('http://host', 1)"),
        ("at <http://host/x?sig=secret>.", "at <http://host/x>."),
        ("http://host/x?sig=secret: refused (s3://b/a?sig=secret)", "http://host/x: refused (s3://b/a)"),
        ("Max retries exceeded with url: /x?sig=secret/health (", "Max retries exceeded with url: /x ("),
        ("http://me:sec\\ret@host/x", "http://host/x"),
        ("http://host/x?password=sec\\ret", "http://host/x"),
    ],
)
def test_credentials_are_hidden(text: str, shown: str) -> None:
    assert hide_credentials(text) == shown


@pytest.mark.parametrize(
    "text", ["http://h/x?sig=secret", 'a "s3://u:secret@b/c?d"', "x http://h?a=secret\nb", "(http://h?secret\\)"]
)
@pytest.mark.parametrize("separators", [None, (",", ":")])
def test_hiding_credentials_leaves_json_what_it_is(text: str, separators: tuple | None) -> None:
    told = {"reasons": [text, [text]], text: {"more": text}}
    hidden = hide_credentials(json.dumps(told, separators=separators))
    assert "secret" not in hidden
    assert [type(value) for value in json.loads(hidden).values()] == [list, dict]


@pytest.mark.parametrize(
    "uri", ["http://me:sec ret@host", "http://me:secret@host\n", 'http://me:"secret"@host', "a <secret>"]
)
def test_an_address_with_what_no_url_holds_is_refused_without_showing_it(uri: str) -> None:
    with pytest.raises(ValidationError, match="write %20 for a blank") as refused:
        Registry(tracking_uri=uri)
    assert "ret" not in refused.value.errors()[0]["msg"]


@pytest.mark.parametrize("given", ["http://me:se/cret@host:x", ["http://me:secret@host"], {"uri": "http://a:secret@b"}])
def test_a_mistake_in_settings_is_told_without_credentials(given: object) -> None:
    with pytest.raises(UserError, match="recipe x: ") as refused:
        validated(RunsPlace, {"registry": {"tracking_uri": given}}, "recipe x")
    assert "cret" not in str(refused.value)
