"""Asking a dashboard, and one clear line for whatever is wrong with it."""

import socket
import threading

import pytest

from jobs.cluster import dashboard as module
from jobs.cluster.dashboard import DEFAULT, Dashboard, DashboardDownError, JobExistsError, NoJobError, dashboard_address
from pipelines.workflow.errors import UserError


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_the_address_is_the_one_given_else_the_environments_else_this_machines(monkeypatch) -> None:
    assert dashboard_address(None) == DEFAULT
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of the cluster itself
    assert dashboard_address(None) == DEFAULT
    monkeypatch.setenv("RAY_ADDRESS", "http://b:8265/")
    assert dashboard_address(None) == "http://b:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://a")
    assert dashboard_address(None) == "https://a"
    assert dashboard_address("c:8265") == "http://c:8265"
    assert dashboard_address("https://c/ray/") == "https://c/ray"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://me:secret@h:8265")
    with pytest.raises(UserError, match="http://h:8265: give the address of Ray's dashboard"):
        dashboard_address(None)


@pytest.mark.parametrize("address", ["ray://h:10001", "http://h:x", "http://", "http://me:secret@h:8265"])
def test_what_is_no_address_of_a_dashboard_is_refused_in_one_line_without_its_password(address: str) -> None:
    with pytest.raises(UserError) as raised:
        dashboard_address(address)
    assert "http://HOST:8265" in str(raised.value)
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_closed_port_is_named() -> None:
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(DashboardDownError, match=rf"nothing answers at {address} \(Connection refused\)"):
            Dashboard(address)


@pytest.mark.parametrize("answer", [(404, "not here"), (200, "<html>"), (200, "[]"), (200, '{"version": 1}')])
def test_a_web_server_that_is_no_ray_is_told_apart(serve, answer) -> None:
    answers, _ = serve({"/api/version": answer})
    with pytest.raises(UserError, match=f"what answers at {answers.address} is no dashboard of Ray's"):
        Dashboard(answers.address)


def test_one_that_is_silent_is_not_waited_for(monkeypatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(DashboardDownError, match=r"nothing answers at .* \(timed out\)"),
    ):
        Dashboard(f"http://127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize("says", [b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\r\n", b""])  # as gRPC begins, or nothing
def test_a_server_that_speaks_no_http_is_no_dashboard(says: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            connection.recv(4096)
            connection.sendall(says)
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(UserError, match="is no dashboard of Ray's"):
            Dashboard(f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join()


def test_a_token_is_sent_where_ray_is_told_to_and_a_missing_one_is_asked_for(serve, tmp_path, monkeypatch) -> None:
    def version(headers) -> object:
        right = headers["Authorization"] == "Bearer secret-token"
        return {"ray_version": "1"} if right else (401, "Unauthorized: Missing authentication token")

    answers, _ = serve({"/api/version": version})
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UserError, match=r"wants its token \(401\): set RAY_AUTH_MODE"):
        Dashboard(answers.address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(UserError, match="token cannot be read"):
        Dashboard(answers.address)
    (tmp_path / "token").write_text("secret-token\n")
    assert Dashboard(answers.address).ray_version == "1"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")  # it goes before the file, as Ray has it
    with pytest.raises(UserError, match="wants its token") as raised:
        Dashboard(answers.address)
    assert "wrong" not in str(raised.value)


def test_jobs_of_ours_are_listed_newest_first_and_others_are_passed_over(serve, ray_pages, details) -> None:
    old, new = details("tiny-1", start_time=1000), details("tiny-2", start_time=2000, end_time=5000)
    others = [
        {"submission_id": None, "status": "RUNNING"},
        {"submission_id": "x", "status": "FAILED", "metadata": None},
    ]
    answers, _ = serve({**ray_pages, "/api/jobs/": [*others, old, new]})
    jobs = Dashboard(answers.address).jobs()
    assert [(job.id, job.began, job.ended) for job in jobs] == [("tiny-2", 2, 5), ("tiny-1", 1, None)]
    assert (jobs[0].owner, jobs[0].tags, jobs[0].recipe) == ("ann", {"project": "code"}, "name: tiny\n")


def test_an_id_that_is_not_there_is_answered_with_the_nearest(serve, ray_pages, details) -> None:
    answers, _ = serve({**ray_pages, "/api/jobs/": [details("tiny-1a2b"), details("long-9f9f")]})
    with pytest.raises(NoJobError, match=r"no job tiny-1a2c at .*: did you mean tiny-1a2b\?$"):
        Dashboard(answers.address).job("tiny-1a2c")
    with pytest.raises(NoJobError, match="fot jobs"):
        Dashboard(answers.address).job("quite/else")


def test_a_package_is_sent_once_and_a_job_that_exists_is_told(serve, ray_pages) -> None:
    answers, _ = serve({**ray_pages, "/api/packages/gcs/there.zip": {}})
    dashboard = Dashboard(answers.address)
    dashboard.upload("gcs://there.zip", b"zip")
    assert answers.asked[1:] == [("GET", "/api/packages/gcs/there.zip")]
    answers.pages["/api/jobs/"] = (500, "Traceback\nValueError: Job with submission_id x already exists. Please")
    with pytest.raises(JobExistsError):
        dashboard.submit({})


def test_a_servers_error_is_its_last_line_without_credentials(serve, ray_pages) -> None:
    answers, _ = serve(
        {**ray_pages, "/api/jobs/": (500, "Traceback\n at http://me:secret@gcs:1/x\nBad: http://me:secret@h")}
    )
    with pytest.raises(DashboardDownError, match=r"answers 500: Bad: http://h$"):
        Dashboard(answers.address).jobs()
