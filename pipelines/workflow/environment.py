"""Environment variables that Ray, DeepSpeed, MLflow and transformers read while they are imported."""

import os
import secrets

WORKERS = {
    "OMP_NUM_THREADS": "1",  # two busy OpenMP pools on two cores collapse
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # with the password that is in it
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}

# What a person may set differently: a tracking server that is down is found so in seconds, one that is asked and never
# answers in a minute, not in several; a database that was deleted is not written to through a connection left open;
# MLflow's remarks stay out of what people read.
UNLESS_SET = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

OWN_RAY = {
    "RAY_AUTH_MODE": "token",  # with a token of its own: Ray's choice depends on what an earlier one left in the home
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite the name: all its servers listen on loopback only
}


def prepare_environment(own_ray: bool = True) -> None:
    """Set them for this process and those it starts. To be called before any of these libraries is imported.

    `own_ray`: where no cluster is named, a Ray of this machine's own is meant, whose token nobody else has.
    """
    os.environ.update(WORKERS)
    for name, value in UNLESS_SET.items():
        os.environ.setdefault(name, value)
    if own_ray and os.environ.get("RAY_ADDRESS", "local") in ("", "local"):
        os.environ.update(OWN_RAY)
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
