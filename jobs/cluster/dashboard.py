"""Ray's dashboard over HTTP: the Jobs API, and what the cluster is. No Ray is imported, so commands answer at once.

Every request has a time limit. What goes wrong is one line: DashboardDownError for what may answer later, UserError
for the rest.
"""

import difflib
import json
import os
import socket
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from jobs.cluster.job import Job, read_job
from pipelines.workflow.credentials import hide_credentials
from pipelines.workflow.errors import UserError

DEFAULT = "http://127.0.0.1:8265"
PATIENCE = 10.0  # seconds for an answer
UPLOAD_PATIENCE = 120.0
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class DashboardDownError(UserError):
    """The dashboard does not answer now."""


class AnswerLostError(DashboardDownError):
    """What was asked may have been done."""


class NoJobError(UserError):
    """The cluster knows no job of ours with this id."""


class JobExistsError(UserError):
    """Somebody submitted a job with this id a moment before."""


def dashboard_address(given: str | None) -> str:
    """The address given, else the environment's where it is one of a dashboard, else that of a Ray on this machine.

    Raises UserError for what is no http address.
    """
    if given is None:
        found = (os.environ.get(name, "") for name in ADDRESSES)
        given = next((address for address in found if address.startswith(("http://", "https://"))), DEFAULT)
    address = given if "://" in given else f"http://{given}"
    try:
        parts = urlsplit(address)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None
        _ = parts.port
    except ValueError:
        right = False
    if not right:
        raise UserError(
            f"{hide_credentials(address)}: give the address of Ray's dashboard, http://HOST:8265, without a password "
            f"(not that of a Ray client, ray://, nor of the cluster itself)"
        )
    return address.rstrip("/")


class Dashboard:
    """That of a cluster, at an http address. Raises UserError where there is none."""

    def __init__(self, address: str) -> None:
        self.address, self.ray_version = address, ""
        try:
            self.ray_version = str(json.loads(self._ask("GET", "/api/version"))["ray_version"])
        except DashboardDownError:
            raise
        except (_NoSuchPageError, ValueError, KeyError, TypeError):
            raise self._no_ray() from None

    def get(self, page: str) -> Any:
        """The content of an answer in JSON, which Ray wraps in `data`."""
        try:
            answer = self._json(page)
        except _NoSuchPageError:
            raise UserError(
                f"Ray {self.ray_version} at {self.address} has no page {page}: use this one's version"
            ) from None
        return answer["data"] if isinstance(answer, dict) and "data" in answer else answer

    def jobs(self) -> list[Job]:
        """Our jobs, the newest first."""
        found = (read_job(details) for details in self.get("/api/jobs/"))
        return sorted((job for job in found if job is not None), key=lambda job: (-job.began, job.id))

    def job(self, job_id: str) -> Job:
        """One of them. Raises NoJobError, with the nearest ids, where there is none."""
        try:
            job = read_job(self._json(f"/api/jobs/{quote(job_id, safe='')}"))
        except _NoSuchPageError:
            job = None
        if job is None:
            ids = [job.id for job in self.jobs()]
            near = difflib.get_close_matches(job_id, ids, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "`fot jobs` lists those that are there"
            raise NoJobError(f"no job {job_id} at {self.address}: {hint}")
        return job

    def log(self, job_id: str) -> str:
        """All that a job has printed so far. Raises NoJobError where there is no such job."""
        try:
            return str(self._json(f"/api/jobs/{quote(job_id, safe='')}/logs")["logs"])
        except _NoSuchPageError:
            raise NoJobError(f"no job {job_id} at {self.address}: `fot jobs` lists those that are there") from None

    def upload(self, uri: str, content: bytes) -> None:
        """Put a package of code, gcs://NAME.zip, where the cluster's nodes find it, if it is not there."""
        page = "/api/packages/gcs/" + uri.removeprefix("gcs://")
        try:
            self._ask("GET", page)
        except _NoSuchPageError:
            self._ask("PUT", page, content, UPLOAD_PATIENCE)

    def submit(self, request: dict[str, Any]) -> None:
        """Start a job. Raises JobExistsError where there is one with its id."""
        self._ask("POST", "/api/jobs/", json.dumps(request).encode(), UPLOAD_PATIENCE)

    def stop(self, job_id: str) -> None:
        """Have Ray send the job's driver SIGTERM, and kill it some time after that. Returns at once."""
        self._ask("POST", f"/api/jobs/{quote(job_id, safe='')}/stop")

    def _json(self, page: str) -> Any:
        answer = self._ask("GET", page)
        try:
            return json.loads(answer)
        except ValueError:
            raise DashboardDownError(f"Ray's dashboard at {self.address} answers with what is no JSON") from None

    def _ask(self, method: str, page: str, content: bytes | None = None, patience: float | None = None) -> bytes:
        kind = {"Content-Type": "application/json"} if method == "POST" else {}
        request = Request(self.address + page, content, {**kind, **_token()}, method=method)
        try:
            with urlopen(request, timeout=patience or PATIENCE) as answer:
                return bytes(answer.read())
        except HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            if not self.ray_version and isinstance(reason, ConnectionResetError | HTTPException):
                raise self._no_ray() from None  # something is there, and does not speak HTTP
            why = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            unheard = isinstance(reason, ConnectionRefusedError | socket.gaierror)
            raise (DashboardDownError if unheard else AnswerLostError)(
                f"nothing answers at {self.address} ({why}): start the cluster, or give its dashboard by --address "
                f"http://HOST:8265"
            ) from None

    def _refusal(self, error: HTTPError) -> Exception:
        text = error.read().decode(errors="replace").strip()
        if error.code in (401, 403):
            return UserError(
                f"Ray at {self.address} wants its token ({error.code}): set RAY_AUTH_MODE=token, and "
                f"RAY_AUTH_TOKEN_PATH to the file that holds it"
            )
        if error.code == 404:
            return _NoSuchPageError()
        if "already exists" in text:
            return JobExistsError(f"there is such a job at {self.address}")
        why = text.splitlines()[-1] if text else error.reason
        return (AnswerLostError if error.code >= 500 else DashboardDownError)(
            f"Ray's dashboard at {self.address} answers {error.code}: {hide_credentials(why)[:300]}"
        )

    def _no_ray(self) -> UserError:
        return UserError(
            f"what answers at {self.address} is no dashboard of Ray's: give its address by --address http://HOST:8265"
        )


class _NoSuchPageError(Exception):
    """Answer 404."""


def _token() -> dict[str, str]:
    """The header for a cluster with token authentication, by Ray's own variables."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN")
    if not token:
        file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").expanduser()
        try:
            token = file.read_text().strip()
        except OSError as error:
            raise UserError(
                f"RAY_AUTH_MODE=token, but {file} cannot be read ({error.strerror}): set RAY_AUTH_TOKEN_PATH"
            ) from None
    return {"Authorization": f"Bearer {token}"}
