"""A corpus, a recipe and a `fot` small enough for tests, all made on the spot; a tracking server of MLflow's own and a
Ray cluster that can be killed and started again; a browser."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

import psutil
import pytest
import yaml

from jobs.cluster.dashboard import DEFAULT, Dashboard, DashboardDownError

FOT = str(Path(sys.executable).with_name("fot"))
TOKEN = "a-token-of-thirty-two-characters"


def words(count: int, seed: int) -> str:
    draw = random.Random(seed)
    names = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(30)]
    return " ".join(draw.choice(names) for _ in range(count))


def training(kind: str, **changes: object) -> dict:
    objective: dict = {"kind": kind, "context": 16}
    if kind == "fot":
        objective |= {"mem_layers": [1], "segments": [[0, 0], [1, 1]]}
    return {
        "objective": objective,
        "steps": 6,
        "batch": {"micro_batches": 2, "groups": 2},
        "optimizer": {"learning_rate": 1e-3},
        "checkpoints": {"every": 2},
        **changes,
    }


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"id": f"d{n}", "text": words(150 + 10 * n, n)}) for n in range(24)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path) -> dict:
    """A whole run of a few steps."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "name": "tiny",
        "work_dir": "runs",
        "data": {"sources": [{"name": "words", "path": str(corpus), "held_out": 0.3}]},
        "tokenizer": {"vocab_size": 300},
        "base": {"pretrain": {"shape": shape, "training": training("standard")}},
        "finetune": training("fot"),
        "evaluation": {
            "perplexity": {"contexts": [1, 2, 4], "windows": 8},
            "passkey": {"lengths": [20], "trials": 2, "digits": 2},
        },
        "resources": {"workers": 2},
    }


@pytest.fixture
def write_recipe(tmp_path: Path):
    def write(recipe: dict) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write


@pytest.fixture
def start_fot(tmp_path: Path):
    """Starts `fot ...` as a user would, stdout and stderr joined; `prefix` is a command to start it with."""
    started: list[subprocess.Popen] = []

    def start(*arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
        process = subprocess.Popen(
            [*prefix, FOT, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "250"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def fot(start_fot):
    """Runs `fot ...` to its end. Returns the finished process."""

    def run(*arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        process = start_fot(*arguments, prefix=prefix)
        printed, _ = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, printed)

    return run


@pytest.fixture
def fot_here(local_ray, tmp_path: Path, monkeypatch, capfd):
    """As `fot`, but in this process and on the Ray it has: without the seconds that starting both takes."""
    import click

    from jobs.cli.fot import fot
    from jobs.common.errors import user_message

    def run(*arguments: object) -> subprocess.CompletedProcess:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "250")
        code, message = 0, ""
        try:
            fot([str(argument) for argument in arguments], standalone_mode=False)
        except click.ClickException as error:
            code, message = error.exit_code, error.format_message()
        except Exception as error:
            if (known := user_message(error)) is None:
                raise
            code, message = 2, f"fot: {known}\n"
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, err + out + message)

    return run


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """MLflow's database with nothing in it: making one takes ten seconds."""
    from jobs.registry.server import connect, embedded_uri

    directory = tmp_path_factory.mktemp("mlflow")
    connect(embedded_uri(directory))
    return directory / "mlflow.db"


@pytest.fixture
def work_dir(tmp_path: Path, empty_database: Path) -> Path:
    """A work directory with a database of MLflow's."""
    directory = tmp_path / "runs"
    directory.mkdir()
    shutil.copy(empty_database, directory)
    return directory


@pytest.fixture
def port() -> int:
    """A free one."""
    return free_port()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen) -> None:
    for _ in range(600):
        assert process.poll() is None, process.communicate()
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"nothing answers at {url}")


class Server:
    """`mlflow server` on a port of its own, with a database and files that outlive it."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.port = directory, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        if self._process is not None:
            return
        database, files = self.directory / "mlflow.db", self.directory / "files"
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                *("--workers", "1", "--backend-store-uri", f"sqlite:///{database}"),
                *("--artifacts-destination", str(files)),
            ],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(self.uri, self._process)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def tracking_server(tmp_path_factory, empty_database: Path):
    """Not started: a test starts it, and may kill it."""
    directory = tmp_path_factory.mktemp("server")
    (directory / "mlflow.db").write_bytes(empty_database.read_bytes())
    server = Server(directory)
    yield server
    server.kill()


class Browser:
    """A real one, in which pages are built as they are for a person."""

    PATIENCE = 60  # seconds for a page to show what is waited for

    def __init__(self, chromium: str, driver: str) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1600,1200"):
            options.add_argument(argument)
        self._driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
        self._driver.set_page_load_timeout(self.PATIENCE)

    def open(self, url: str) -> None:
        self._driver.get(url)

    def script(self, text: str, *arguments: object) -> object:
        return self._driver.execute_script(text, *arguments)

    def wait_for(self, seen: Callable[[], object]) -> object:
        """What `seen` gives as soon as it is something; the page's text is told where it never is."""
        end = time.monotonic() + self.PATIENCE
        while time.monotonic() < end:
            try:
                if found := seen():
                    return found
            except Exception as error:  # the page is being built
                if "selenium" not in type(error).__module__:
                    raise
            time.sleep(0.2)
        raise AssertionError(f"{self._driver.current_url} never showed it: {self._text()[:2000]}")

    def wait_for_texts(self, *texts: str) -> None:
        self.wait_for(lambda: all(text in self._text() for text in texts))

    def click(self, text: str) -> None:
        """On the last and innermost of what has just this text, once it is there."""
        has_text = "[...document.querySelectorAll('*')].filter(each => each.textContent.trim() === arguments[0])"

        def click() -> bool:
            found = self.script(f"return {has_text}.pop()", text)
            if found is not None:
                found.click()
            return found is not None

        self.wait_for(click)

    def quit(self) -> None:
        self._driver.quit()

    def _text(self) -> str:
        return str(self.script("return document.body.innerText"))


@pytest.fixture
def browser():
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        if os.environ.get("CI"):
            pytest.fail("the pages are to be seen in Chromium: install chromium and chromium-driver")
        pytest.skip("no chromium with chromedriver here: pages are not looked at")
    browser = Browser(chromium, driver)
    yield browser
    browser.quit()


class RealCluster:
    """Ray with token authentication: a head and nodes, every one by a `ray start` of its own, on the loopback address.

    `environment`: what whoever runs the cluster says to it; `client`: what its users' environment holds.
    """

    def __init__(self, head_cpus: int, environment: dict[str, str] | None = None) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="fot", dir="/tmp"))  # its sockets have no room for a longer path
        token = self.directory / "token"
        token.write_text(TOKEN)
        self.client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        given = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._environment = {**given, **self.client, "RAY_USAGE_STATS_ENABLED": "0", **(environment or {})}
        self._head_cpus, self._port, self._pages, self._agent = head_cpus, free_port(), free_port(), free_port()
        self.address = DEFAULT.rpartition(":")[0] + f":{self._pages}"
        self.nodes: list[subprocess.Popen] = []
        self._added = 0

    @property
    def ray_address(self) -> str:
        """For who connects to Ray itself."""
        return f"127.0.0.1:{self._port}"

    def give_to_user(self, patched: pytest.MonkeyPatch) -> None:
        patched.delenv("RAY_AUTH_TOKEN", raising=False)
        for name, value in self.client.items():
            patched.setenv(name, value)

    def start_head(self) -> None:
        self.head = self._start(
            "--head",
            f"--num-cpus={self._head_cpus}",
            f"--port={self._port}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self._pages}",
            f"--dashboard-agent-listen-port={self._agent}",
            f"--temp-dir={self.directory / 'ray'}",
        )
        self.wait_for_nodes(1)

    def add_node(self, cpus: int) -> None:
        self._added += 1
        own = f"--temp-dir={self.directory / f'n{self._added}'}"  # in a common one, nodes clear away each other's code
        agent = f"--dashboard-agent-listen-port={free_port()}"
        self.nodes.append(self._start(f"--address=127.0.0.1:{self._port}", f"--num-cpus={cpus}", agent, own))
        self.wait_for_nodes(1 + len(self.nodes))

    def wait_for_nodes(self, count: int) -> None:
        until = time.monotonic() + 180
        while self._alive() != count:
            for process in (self.head, *self.nodes):
                assert process.poll() is None, self.printed()
            assert time.monotonic() < until, self.printed()
            time.sleep(0.5)

    def kill(self, process: subprocess.Popen) -> None:
        """SIGKILL for a node, whose processes are all those of its session, and what they started."""
        for member in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait(30)

    def end(self) -> None:
        for process in (*self.nodes, self.head):
            process.send_signal(signal.SIGTERM)
        for process in (*self.nodes, self.head):
            process.wait(60)
        shutil.rmtree(self.directory, ignore_errors=True)

    def printed(self) -> str:
        return (self.directory / "log").read_text()

    def _alive(self) -> int:
        try:
            nodes = Dashboard(self.address).get("/api/v0/nodes?limit=10000")["result"]["result"]
        except DashboardDownError:
            return 0
        return sum(node["state"] == "ALIVE" for node in nodes)

    def _start(self, *options: str) -> subprocess.Popen:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--node-ip-address=127.0.0.1"]
        command += ["--object-store-memory=100000000", *options]
        with open(self.directory / "log", "a") as log:
            return subprocess.Popen(command, env=self._environment, stdout=log, stderr=log, start_new_session=True)


@pytest.fixture(scope="session")
def real_cluster() -> type[RealCluster]:
    return RealCluster


@pytest.fixture
def cluster(monkeypatch):
    """A head that only drives, and two nodes with a CPU each."""
    cluster = RealCluster(0)
    cluster.give_to_user(monkeypatch)
    cluster.start_head()
    for _ in range(2):
        cluster.add_node(1)
    yield cluster
    cluster.end()


CHAT = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"


@pytest.fixture(scope="session")
def llama_for_gguf():
    """A random LLaMA of two layers with grouped keys, and a byte-level BPE of 300 tokens: what the GGUF holds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    config = LlamaConfig(
        vocab_size=300, max_position_embeddings=64, tie_word_embeddings=True, rope_parameters=rope, **shape, **heads
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def write_gguf(llama_for_gguf, tmp_path_factory):
    """Writes that LLaMA as llama.cpp's converter does, with other header values (None: leaves one out) and tensors."""
    import numpy as np
    from gguf import GGUFWriter, TokenType, get_tensor_name_map
    from gguf.constants import MODEL_ARCH

    from pipelines.tokens.tokenizer import train_tokenizer

    directory = tmp_path_factory.mktemp("tokenizer-for-gguf")
    train_tokenizer([words(3000, 1) + " 12 345\n\n   7"], 300, directory)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)

    def interleaved(rows, heads: int):
        """llama.cpp's order of a head's rows for RoPE."""
        return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)

    def write(path: Path, arch: str = "llama", tensors: Mapping = MappingProxyType({}), **changes: object) -> Path:
        config, names = llama_for_gguf.config, get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
        header: dict = {
            f"{arch}.block_count": 2,
            f"{arch}.context_length": 64,
            f"{arch}.embedding_length": 32,
            f"{arch}.feed_forward_length": 48,
            f"{arch}.attention.head_count": 4,
            f"{arch}.attention.head_count_kv": 2,
            f"{arch}.rope.freq_base": 5000.0,
            f"{arch}.rope.dimension_count": 8,
            f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.padding_token_id": 1,
            "tokenizer.chat_template": CHAT,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        writer = GGUFWriter(path, arch)
        for key, value in header.items():
            match value:
                case str():
                    writer.add_string(key, value)
                case int():
                    writer.add_uint32(key, value)
                case float():
                    writer.add_float32(key, value)
        writer.add_token_list(tokens)
        writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(tokens) - 2))
        writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
        for name, tensor in llama_for_gguf.state_dict().items():
            if name == "lm_head.weight":
                continue
            rows = tensor.numpy()
            if "q_proj" in name or "k_proj" in name:
                rows = interleaved(rows, 4 if "q_proj" in name else 2)
            writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(rows))
        for name, rows in tensors.items():
            writer.add_tensor(name, rows)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
