"""The instruments of integration/vllm, against a server of a few lines."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import tiny

FOLDER = Path(__file__).parent.parent / "integration" / "vllm"
sys.path.insert(0, str(FOLDER))

from agreement import Continuation, compare, continue_greedily, log_probs  # noqa: E402
from server import ServerFailed, serve  # noqa: E402

SERVER = """
import json, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, {"data": [{"id": "m"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["prompt"] == [0]:
            return self.reply(400, {"message": "no such token"})
        entries = [{str(t): {"logprob": -t / 8, "rank": 1}} for t in body["prompt"]]
        ids = [7] * body["max_tokens"]
        choice = {"token_ids": ids, "prompt_logprobs": [None, *entries[1:]]}
        self.reply(200, {"choices": [choice]})

    def reply(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

host, port = sys.argv[2], int(sys.argv[4])
HTTPServer((host, port), Handler).serve_forever()
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    return [sys.executable, str(script)]


def is_alive(pid: int) -> bool:
    """A zombie, which its parent has not yet collected, is dead."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def child_of(log: Path) -> int:
    return int(log.read_text().split()[1])


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} was left over"
        time.sleep(0.05)


def test_a_server_is_asked_and_stopped(command: list[str], tmp_path: Path) -> None:
    log = tmp_path / "logs" / "server.log"
    with serve(command, log) as server:
        assert server.greedy([3, 4], 5) == [7] * 5
        assert server.log_probabilities([3, 4, 5]) == [-4 / 8, -5 / 8]
        pids = [server.process.pid, child_of(log)]
        assert all(map(is_alive, pids))
    for pid in pids:
        wait_for_end(pid)
    assert not log.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_it_is_stopped_when_the_block_fails(
    error: type[BaseException], command: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "server.log"
    with pytest.raises(error), serve(command, log) as server:
        pids = [server.process.pid, child_of(log)]
        raise error
    for pid in pids:
        wait_for_end(pid)
    assert log.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_is_stopped_by_a_signal(
    number: signal.Signals, command: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "server.log"
    script = (
        f"import signal, sys, time; sys.path.insert(0, {str(FOLDER)!r})\n"
        # in a shell's background jobs it is ignored, and children inherit that
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path\n"
        "from server import serve\n"
        f"with serve({command!r}, Path({str(log)!r})) as server:\n"
        "    print(server.process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline()), child_of(log)]
        os.kill(process.pid, number)
        assert process.wait(30) != 0
    for pid in pids:
        wait_for_end(pid)


def test_errors_carry_the_log(command: list[str], tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    crash = [sys.executable, "-c", "print('out of memory'); raise SystemExit(3)"]
    failed = pytest.raises(ServerFailed, match="ended with 3.*\n.*out of memory")
    with failed, serve(crash, log):
        pass
    failed = pytest.raises(ServerFailed, match="answered 400.*no such token")
    with failed, serve(command, log) as server:
        server.greedy([0], 1)


def test_tokens_may_differ_from_a_near_tie_on() -> None:
    expected = [Continuation([1, 2, 3, 4], [1.0, 0.01, 1.0, 1.0])]

    def differences(served: list[int]) -> tuple[int, list[str]]:
        found = compare(expected, [served], [[-1.0]], [[-1.0]], [[-1.0]], tie=0.05)
        return found.tokens_compared, found.differences

    assert differences([1, 2, 3, 4]) == (4, [])
    assert differences([1, 9, 9, 9]) == (1, [])
    count, (difference,) = differences([1, 2, 9, 4])
    assert count == 3
    assert difference == "prompt 0, step 2: 3 here, 9 served, gap 1.0000"
    # the near-tie was decided alike, so what follows it must agree
    assert differences([1, 2, 3, 9])[1]
    with pytest.raises(ValueError):
        differences([1, 2, 3])


def test_log_probabilities_and_perplexity() -> None:
    same = Continuation([1], [1.0])
    one, other = [[-1.0, -2.0], [-3.0]], [[-1.0, -2.5], [-3.1]]
    found = compare([same], [[1]], one, other, one, tie=0.05)
    assert found.log_prob_mean == pytest.approx(0.2)
    assert found.log_prob_max == pytest.approx(0.5)
    assert found.perplexity_change == pytest.approx(2.718281828**0.2 - 1)
    assert found.own_mean == 0 and not found.chaotic
    assert len(found.failures()) == 3


def test_a_model_that_does_not_agree_with_itself_is_compared_with_that() -> None:
    here = [[-1.0, -2.0, -1.5, -2.5] * 50]
    there = [[-1.3, -1.7, -1.8, -2.2] * 50]  # far apart, and yet no worse a model
    one, other = Continuation([1], [1.0]), [2]
    close = compare([one], [[1]], here, here, here, tie=0.05)
    assert not close.failures()
    strict = compare([one], [other], here, there, here, tie=0.05)
    assert len(strict.failures()) == 3 + (strict.perplexity_change > 0.01)
    own = compare([one], [other], here, there, there, tie=0.05)
    assert own.chaotic and not own.failures()
    worse = [[value - 0.3 for value in here[0]]]
    (failure,) = compare([one], [other], here, worse, there, tie=0.05).failures()
    assert "perplexity" in failure


def test_a_disturbance_moves_a_model_a_little() -> None:
    model = tiny.make_model("llama")
    text = list(range(3, 15))
    plain, disturbed = (log_probs(model, text, size) for size in (0.0, 1e-6))
    apart = max(abs(a - b) for a, b in zip(plain, disturbed, strict=True))
    assert 0 < apart < 1e-3


def test_reference_against_generate() -> None:
    model = tiny.make_model("llama")
    prompt = [5, 9, 11]
    found = continue_greedily(model, prompt, 6)
    generated = model.generate(
        torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert found.tokens == generated[0, 3:].tolist()
    assert min(found.gaps) > 0
    loss = model(
        input_ids=torch.tensor([found.tokens]), labels=torch.tensor([found.tokens])
    ).loss
    values = log_probs(model, found.tokens)
    assert -sum(values) / len(values) == pytest.approx(loss.item(), rel=1e-5)
