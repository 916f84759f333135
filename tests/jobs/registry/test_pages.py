"""MLflow's pages in a real browser: a person sees the run, its plot and the model's version."""

import signal
import time
from pathlib import Path

import psutil
import pytest

from jobs.config.registry import Registry
from jobs.registry.record import record

GATE = Registry.model_validate({"promote": [{"metric": "passkey/exact", "at": 2048, "least": 0.9}]})
WORD = "quaxelwimp"  # nowhere but in our run


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(3.21, 2.34), dpi=100)
    axes.plot([1, 2], [2, 1])
    figure.savefig(path)
    pyplot.close(figure)


@pytest.mark.slow
def test_the_run_its_plot_and_the_models_version_are_seen(
    work_dir: Path, make_outcome, start_fot, browser, port
) -> None:
    outcome = make_outcome(tags={"fot.base": f"{WORD}-base"}, params={"objective": f"{WORD}-objective"})
    picture = outcome.model.parent / "perplexity.png"
    plot(picture)
    artifacts = {**outcome.artifacts, "perplexity/perplexity.png": picture}
    outcome = make_outcome(tags=outcome.tags, params=outcome.params, artifacts=artifacts, trainings=[])
    made = record(outcome, work_dir, GATE)

    server = start_fot("registry", "ui", "--work-dir", work_dir, "--port", port)
    line = server.stdout.readline()
    assert line == f"MLflow's pages are at http://127.0.0.1:{port} (Ctrl-C ends them)\n"
    started = psutil.Process(server.pid).children(recursive=True)
    assert started
    assert not any("mlflow.db" in " ".join(child.cmdline()) for child in started)  # an address may hold a password
    url = f"http://127.0.0.1:{port}/#"
    listening = {conn.laddr.ip for child in started for conn in child.net_connections() if conn.status == "LISTEN"}
    assert listening == {"127.0.0.1"}

    from mlflow.tracking import MlflowClient

    experiment = MlflowClient(f"sqlite:///{work_dir}/mlflow.db").get_run(made["run_id"]).info.experiment_id
    page = f"{url}/experiments/{experiment}/runs/{made['run_id']}"
    browser.open(page)
    browser.wait_for_texts(f"{WORD}-objective", "passkey/exact", "Gate: promoted")

    browser.open(f"{page}/artifacts/perplexity/perplexity.png")
    size = "return [...document.images].map(image => [image.naturalWidth, image.naturalHeight].join())"
    browser.wait_for(lambda: "321,234" in browser.script(size))

    browser.open(f"{url}/models/fot.tiny/versions/1")
    browser.wait_for_texts("champion", "candidate", f"{WORD}-base", f"Of the recipe tiny, run {made['run_id']}.")

    server.send_signal(signal.SIGINT)
    assert_all_ended(server, started)


@pytest.mark.slow
def test_a_terminal_that_is_closed_leaves_no_server_behind(work_dir: Path, start_fot, port) -> None:
    server = start_fot("registry", "ui", "--work-dir", work_dir, "--port", port)
    assert "MLflow's pages are at" in server.stdout.readline()
    started = psutil.Process(server.pid).children(recursive=True)
    server.send_signal(signal.SIGHUP)
    time.sleep(0.1)
    server.send_signal(signal.SIGINT)  # while it ends
    assert_all_ended(server, started)


def assert_all_ended(server, started: list) -> None:
    printed, _ = server.communicate(timeout=60)
    assert (server.returncode, printed) == (0, "ended\n")
    assert not [child for child in started if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
