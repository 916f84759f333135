"""What runs on the cluster: `python -m jobs.cluster.entry`, a job's driver, on the head.

Its recipe is in the metadata that Ray hands it. Everything is checked before anything is done; then it is `fot run`.
Exit codes are those of `fot`, and 3 where it was stopped because somebody asked for it.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from jobs.cluster.job import CODE, RECIPE, SUBMISSION
from jobs.common.errors import INTERRUPTED, STOPPED, USER_ERROR, user_message
from jobs.common.stop import StoppedError, stopping_on_sigterm
from jobs.common.version import JOB
from pipelines.workflow.environment import prepare_environment
from pipelines.workflow.files import write_atomically
from pipelines.workflow.visible import visible

JOBS = "jobs"  # of work_dir: the recipe of every job, and the files that ask for stops
GIVEN = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's, with the metadata
WIDTH = "160"  # columns of what is printed


@dataclass(frozen=True)
class Given:
    """What Ray hands the driver of a job. `version`: of the code it was submitted with."""

    job_id: str
    recipe: str
    version: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Given":
        metadata = json.loads(environment[GIVEN])["metadata"]
        return cls(metadata[SUBMISSION], metadata[RECIPE], json.loads(metadata[CODE])["version"])


def run(given: Given) -> None:
    """Check, and run the recipe."""
    from jobs.cluster.package import WORK_DIR, load_all
    from jobs.cluster.preflight import CHECKED, check_code, check_limits, check_nodes, check_places
    from jobs.workflow.run import run_recipe
    from pipelines.workflow.cluster import ray_cluster
    from pipelines.workflow.progress import say

    content = yaml.safe_load(given.recipe)
    check_code(given.version)
    check_places(content)
    directory = Path(content[WORK_DIR]) / JOBS
    path = directory / f"{given.job_id}.yaml"
    write_atomically(path, given.recipe.encode())
    check_limits(load_all(path))
    with ray_cluster():
        nodes = check_nodes(content, path)
        say(f"{CHECKED} {'the one node sees' if nodes == 1 else f'all {nodes} nodes see'} what the recipe names")
        with stopping_on_sigterm(directory / f"{given.job_id}.stop"):  # after Ray, which takes SIGTERM for itself
            run_recipe(path, ())


@contextmanager
def exiting(job_id: str) -> Iterator[None]:
    """What ends the block other than a bug is a line and an exit code."""
    goes_on = f"`fot resume {job_id}` goes on from here"
    try:
        yield
        return
    except KeyboardInterrupt:
        code, line = INTERRUPTED, f"interrupted; {goes_on}"
    except StoppedError as error:
        code, line = STOPPED, f"{error}; {goes_on}"
    except Exception as error:
        if (message := user_message(error)) is None:
            raise
        code, line = USER_ERROR, message
    print(f"fot: {visible(line)}", file=sys.stderr, flush=True)
    sys.exit(code)


def main() -> None:
    """What Ray starts."""
    os.environ.setdefault("COLUMNS", WIDTH)
    prepare_environment()
    given = Given.of(os.environ)
    os.environ[JOB] = given.job_id
    with exiting(given.job_id):
        run(given)


if __name__ == "__main__":
    main()
