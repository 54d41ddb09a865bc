"""`vllm serve` as a context manager, and the questions we ask it."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

HOST = "127.0.0.1"
# A minute on two free cores. A busy machine needs more.
START_SECONDS = float(os.environ.get("VLLM_START_SECONDS", "600"))
ANSWER_SECONDS = START_SECONDS
STOP_SECONDS = 60


class ServerFailed(RuntimeError):
    """The server ended, or did not answer in time; the message has its log's end."""


class Server:
    """
    :param process: the server; it leads a process group of its own
    :param url: where it listens
    :param log: what it wrote
    """

    def __init__(self, process: subprocess.Popen, url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log

    def wait(self, seconds: float = START_SECONDS) -> None:
        """
        Until /health answers.

        :raises ServerFailed: if the server ends before, or the time is over
        """
        deadline = time.monotonic() + seconds
        while not self._healthy():
            if self.process.poll() is not None:
                raise self._failed(f"ended with {self.process.returncode}")
            if time.monotonic() > deadline:
                raise self._failed(f"did not answer within {seconds:.0f} s")
            time.sleep(0.5)

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        """
        POST a JSON body.

        :raises ServerFailed: if the answer is an error
        """
        request = urllib.request.Request(
            f"{self.url}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            answer = error.read().decode(errors="replace")
            raise self._failed(f"answered {error.code}: {answer}") from error

    def greedy(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """
        :param prompt: token ids
        :return: the ids of `tokens` more, each the likeliest
        """
        answer = self.ask(
            "/v1/completions",
            model=self.model(),
            prompt=list(prompt),
            max_tokens=tokens,
            temperature=0,
            ignore_eos=True,
            return_token_ids=True,
        )
        return list(answer["choices"][0]["token_ids"])

    def log_probabilities(self, text: Sequence[int]) -> list[float]:
        """
        :param text: token ids
        :return: log-probability of each but the first, given those before it
        """
        answer = self.ask(
            "/v1/completions",
            model=self.model(),
            prompt=list(text),
            max_tokens=1,
            temperature=0,
            prompt_logprobs=0,
        )
        given = answer["choices"][0]["prompt_logprobs"]
        return [
            entry[str(token)]["logprob"]
            for token, entry in zip(text[1:], given[1:], strict=True)
        ]

    def model(self) -> str:
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=30) as answer:
            return str(json.load(answer)["data"][0]["id"])

    def stop(self) -> None:
        """By its own process id; its children are in the group that it leads."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        # The engine is a child of the server: after a crash it may be left over.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except OSError:  # refused as long as nobody listens
            return False

    def _failed(self, what: str) -> ServerFailed:
        lines = self.log.read_text(errors="replace").splitlines()[-60:]
        return ServerFailed(
            f"the server {what}. The end of its log, {self.log}:\n" + "\n".join(lines)
        )


@contextmanager
def serve(command: Sequence[str], log: Path) -> Iterator[Server]:
    """
    Start a server on a free port of the loopback interface and stop it when the block
    ends, whether well, by an error, by Ctrl-C or by SIGTERM. Its log is removed when
    the block ends well.

    :param command: what starts it; `--host` and `--port` are appended
    :param log: for its output
    """
    port = free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as output, sigterm_raises():
        process = subprocess.Popen(
            [*command, "--host", HOST, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        server = Server(process, f"http://{HOST}:{port}", log)
        try:
            server.wait()
            yield server
        finally:
            server.stop()
    log.unlink()


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM ends Python at once, and no `finally` would stop the server."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
