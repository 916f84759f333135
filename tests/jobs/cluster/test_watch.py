"""Following a job while its log grows, its dashboard goes away and comes back, its cluster dies."""

import threading
import time

import pytest

from jobs.cluster import watch
from jobs.cluster.dashboard import Dashboard, DashboardDownError
from jobs.cluster.watch import follow, last_words, was_checked
from pipelines.workflow.errors import UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    for name, seconds in {"POLL": 0.02, "UNSAID": 0.1, "LOG_PATIENCE": 0.2, "PATIENCE": 20.0}.items():
        monkeypatch.setattr(watch, name, seconds)


def pages(details, log: str, state: str = "RUNNING") -> dict[str, object]:
    return {"/api/jobs/x": details("x", state), "/api/jobs/x/logs": {"logs": log}}


def test_a_log_is_written_in_whole_lines_up_to_its_end_each_once(serve, ray_pages, details) -> None:
    answers, _ = serve({**ray_pages, **pages(details, "one\ntw")})
    written: list[str] = []

    def grow() -> None:
        time.sleep(0.2)
        answers.pages["/api/jobs/x/logs"] = {"logs": "one\ntwo\nthr"}
        time.sleep(0.2)
        answers.pages.update(pages(details, "one\ntwo\nthree\nlast, without an end", "SUCCEEDED"))

    thread = threading.Thread(target=grow)
    thread.start()
    job = follow(Dashboard(answers.address), "x", written.append)
    thread.join()
    assert job.state == "SUCCEEDED"
    assert "".join(written) == "one\ntwo\nthree\nlast, without an end"
    *lines, _ = filter(None, written)
    assert all(text.endswith("\n") for text in lines)


def test_it_goes_on_where_it_was_when_the_dashboard_comes_back(serve, ray_pages, details, capsys) -> None:
    answers, stop = serve({**ray_pages, **pages(details, "one\n")})
    written: list[str] = []

    def outage() -> None:
        time.sleep(0.2)
        stop()
        time.sleep(0.5)
        serve({**ray_pages, **pages(details, "one\ntwo\n", "SUCCEEDED")}, answers.port)

    thread = threading.Thread(target=outage)
    thread.start()
    follow(Dashboard(answers.address), "x", written.append)
    thread.join()
    assert "".join(written) == "one\ntwo\n"
    said = capsys.readouterr().err
    assert said.count("does not answer") == 1
    assert said.count("answers again") == 1


def test_it_gives_up_when_nothing_answers_for_very_long(serve, ray_pages, details, monkeypatch) -> None:
    monkeypatch.setattr(watch, "PATIENCE", 0.3)
    answers, stop = serve({**ray_pages, **pages(details, "")})
    dashboard = Dashboard(answers.address)
    stop()
    with pytest.raises(DashboardDownError):
        follow(dashboard, "x", lambda text: None)


def test_a_cluster_that_was_started_anew_no_longer_knows_the_job(serve, ray_pages, details) -> None:
    answers, _ = serve({**ray_pages, **pages(details, "")})
    forget = threading.Timer(0.2, lambda: answers.pages.pop("/api/jobs/x"))
    forget.start()
    with pytest.raises(UserError, match="started anew and no longer knows job x: submit its recipe again"):
        follow(Dashboard(answers.address), "x", lambda text: None)


def test_an_ended_job_whose_log_is_lost_is_still_told(serve, ray_pages, details, capsys) -> None:
    answers, _ = serve({**ray_pages, **pages(details, "", "FAILED"), "/api/jobs/x/logs": (500, "no agent")})
    assert follow(Dashboard(answers.address), "x", lambda text: None).state == "FAILED"
    assert "the end of its log cannot be had" in capsys.readouterr().err


def test_a_log_that_begins_anew_is_written_from_its_beginning(serve, ray_pages, details) -> None:
    answers, _ = serve({**ray_pages, **pages(details, "a long first line\n")})
    written: list[str] = []
    again = threading.Timer(0.2, lambda: answers.pages.update(pages(details, "new\n", "SUCCEEDED")))
    again.start()
    follow(Dashboard(answers.address), "x", written.append)
    assert "".join(written) == "a long first line\nnew\n"


def test_it_stops_looking_when_the_log_says_what_is_waited_for(serve, ray_pages, details) -> None:
    answers, _ = serve({**ray_pages, **pages(details, "Runtime env\nchecked: all 2 nodes see it\n")})
    assert follow(Dashboard(answers.address), "x", lambda text: None, until=was_checked).state == "RUNNING"
    assert not was_checked("fot: unchecked: x\n")


def test_last_words_are_the_programs_own_where_there_are_any() -> None:
    assert last_words("a\nfot: work_dir /x: bad\n[E] ray says more\n") == "work_dir /x: bad"
    assert last_words("Traceback\nValueError: x\n\n") == "ValueError: x"
    assert last_words("") == "it printed nothing"
