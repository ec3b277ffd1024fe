"""Who is let in, what is told of requests, and what the server says of itself before and while it serves."""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.conftest import ADMIN_KEY, SMALL, Server, launched

SHORT = {"prompt": "import os", "max_tokens": 2, "temperature": 0}
KEYS = ("from-flag", "from-file", "second-of-file", "from-environment")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys from everywhere, behind a path."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("# of the team\nfrom-file\n\n  second-of-file  \n")
    flags = ("--api-key", "from-flag", "--api-key-file", str(keys), "--root-path", "/llm", "--access-log", "json")
    more = ("--cors-origin", "https://a.example", "--max-prompt-tokens", "20", "--max-body-bytes", "5000")
    with launched(
        "demo", "--port", "0", *SMALL, *flags, *more, env={"QUIRE_API_KEYS": "other, from-environment"}
    ) as server:
        server.wait_ready()
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def headers_of(server: Server, path: str, method: str = "GET", **headers: str) -> dict[str, str]:
    """The headers of an answer, names in lower case. Header names are given with underscores."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(server.url + path, headers=named, method=method)
    with urllib.request.urlopen(request, timeout=20) as response:
        return {name.lower(): value for name, value in response.headers.items()}


def test_ready_tells_how_far_the_start_has_come_while_health_is_ok() -> None:
    with launched("demo", "--port", "0", *SMALL) as server:
        deadline = time.monotonic() + 240
        while not (found := re.search(r" at (http://\S+),", server.log.read_text())):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.url = found.group(1)
        seen = []
        while not seen or seen[-1][0] != 200:
            assert time.monotonic() < deadline
            try:
                seen.append((server.get("/ready")[0], json.loads(server.get("/ready")[1])))
            except urllib.error.URLError:  # it does not listen yet
                continue
            assert server.get("/health")[0] == 200
            status, answer = server.post("/v1/completions", SHORT)
            assert status == 200 or "the server is starting" in answer["error"]["message"]
            assert "0 of 0" not in str(answer)
            time.sleep(0.05)
        starting = [answer for status, answer in seen if status == 503]
        assert starting
        assert {answer["status"] for answer in starting} <= {"starting", "ready"}
        shares = [answer["progress"] for _, answer in seen]
        assert shares == sorted(shares)
        assert shares[-1] == 1
        assert seen[-1][1]["status"] == "ready"


@pytest.mark.parametrize("key", KEYS)
def test_keys_from_flag_file_and_environment_open(guarded: Server, key: str) -> None:
    guarded.wait_ready()
    assert guarded.post("/v1/completions", SHORT, **bearer(key))[0] == 200


@pytest.mark.parametrize(
    "headers", [{}, bearer("wrong"), bearer(""), bearer("# of the team"), {"Authorization": "Basic from-flag"}]
)
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/generate", "/generate_stream"]
)
def test_no_generation_without_a_key(guarded: Server, path: str, headers: dict[str, str]) -> None:
    status, answer = guarded.post(path, {}, **headers)
    assert status == 401
    assert answer["error"]["code"] == "invalid_api_key"


def test_probes_metrics_and_page_need_no_key_and_models_do(guarded: Server) -> None:
    guarded.wait_ready()
    assert [guarded.get(path)[0] for path in ("/", "/health", "/ready", "/metrics", "/version", "/openapi.json")] == [
        200
    ] * 6
    assert [guarded.get(path)[0] for path in ("/v1/models", "/info")] == [401] * 2


@pytest.mark.parametrize("key", ["", "from-flag", ADMIN_KEY])
def test_admin_endpoint_does_not_exist_without_an_admin_key(guarded: Server, key: str) -> None:
    assert guarded.get("/admin/scheduler", **bearer(key))[0] == 404


def test_admin_endpoint_takes_the_admin_key_alone(server: Server) -> None:
    assert server.get("/admin/scheduler")[0] == 401
    assert server.get("/admin/scheduler", **bearer("from-flag"))[0] == 401
    assert server.get("/admin/scheduler", **bearer(ADMIN_KEY))[0] == 200


def test_a_change_is_counted_logged_and_undone_by_what_it_answers(server: Server) -> None:
    name = 'vllm:scheduler_setting_changes_total{setting="max_num_seqs"}'
    count = server.metrics().get(name, 0)
    status, answer = server.post("/admin/scheduler", {"max_num_seqs": 3}, **bearer(ADMIN_KEY))
    assert status == 200
    assert answer["settings"]["max_num_seqs"] == 3
    status, undone = server.post("/admin/scheduler", answer["before"], **bearer(ADMIN_KEY))
    assert status == 200
    assert undone["settings"] == answer["before"]
    assert server.metrics()[name] == count + 2
    assert "scheduler setting max_num_seqs changed from 8 to 3" in server.log.read_text()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"max_num_seqs": 9}, "max_num_seqs"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"batching": "magic"}, "batching"),
        ({"block_size": 8}, "block_size"),
    ],
)
def test_a_change_that_cannot_be_made_changes_nothing(server: Server, change: dict, part: str) -> None:
    before = server.get("/admin/scheduler", **bearer(ADMIN_KEY))
    status, answer = server.post("/admin/scheduler", {"max_queued_requests": 7, **change}, **bearer(ADMIN_KEY))
    assert status == 400
    assert part in answer["error"]["message"]
    assert server.get("/admin/scheduler", **bearer(ADMIN_KEY)) == before


def test_request_id_is_the_callers_or_a_fresh_one(guarded: Server) -> None:
    assert headers_of(guarded, "/health", X_Request_Id="mine-1")["x-request-id"] == "mine-1"
    made = {
        headers_of(guarded, "/health", **given)["x-request-id"]
        for given in ({}, {"X_Request_Id": "a b"}, {"X_Request_Id": "x" * 200})
    }
    assert len(made) == 3
    assert all(re.fullmatch("[0-9a-f]{32}", found) for found in made)


def test_access_log_has_a_json_line_per_request(guarded: Server) -> None:
    headers_of(guarded, "/version", X_Request_Id="find-me")
    deadline = time.monotonic() + 20
    while "find-me" not in guarded.log.read_text():  # the line is written when the answer has been sent
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (line,) = [text for text in guarded.log.read_text().splitlines() if "find-me" in text]
    entry = json.loads(line)
    assert (entry["method"], entry["status"], entry["request_id"]) == ("GET", 200, "find-me")
    assert entry["path"].endswith("/version")
    assert entry["bytes"] > 0
    assert entry["seconds"] >= 0


def test_only_pages_of_named_origins_may_read(guarded: Server) -> None:
    assert (
        headers_of(guarded, "/health", Origin="https://a.example")["access-control-allow-origin"] == "https://a.example"
    )
    assert "access-control-allow-origin" not in headers_of(guarded, "/health", Origin="https://b.example")
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,content-type"}
    allowed = headers_of(guarded, "/v1/completions", "OPTIONS", Origin="https://a.example", **asked)
    assert "POST" in allowed["access-control-allow-methods"]
    assert "authorization" in allowed["access-control-allow-headers"]


def test_paths_are_served_with_and_without_the_root_path(guarded: Server) -> None:
    guarded.wait_ready()
    assert guarded.url.endswith("/llm")
    bare = Server(guarded.process, guarded.log, guarded.url.removesuffix("/llm"))
    for one in (guarded, bare):
        assert one.get("/health")[0] == 200
        assert one.post("/v1/completions", SHORT, **bearer("from-flag"))[0] == 200
        assert one.post("/v1/completions", SHORT)[0] == 401
        assert json.loads(one.get("/openapi.json")[1])["servers"] == [{"url": "/llm"}]


def test_prompts_and_bodies_have_their_limits(guarded: Server) -> None:
    guarded.wait_ready()
    status, answer = guarded.post("/v1/completions", {**SHORT, "prompt": list(range(5, 26))}, **bearer("from-flag"))
    assert status == 400
    assert answer["error"]["param"] == "prompt"
    assert "21 tokens" in answer["error"]["message"]
    assert guarded.post("/v1/completions", {**SHORT, "prompt": list(range(5, 25))}, **bearer("from-flag"))[0] == 200
    status, answer = guarded.post("/v1/completions", {**SHORT, "user": "x" * 5000}, **bearer("from-flag"))
    assert status == 413
    assert "5000 bytes" in answer["error"]["message"]


def test_tls_is_spoken_with_the_files_that_are_given(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject]
    try:
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl to make a certificate")
    context = ssl.create_default_context(cafile=str(certificate))
    with launched(
        "demo", "--port", "0", "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), *SMALL
    ) as server:
        deadline = time.monotonic() + 60
        while not (found := re.search(r" at (https://\S+),", server.log.read_text())):
            assert server.process.poll() is None, server.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for _ in range(100):
            try:
                with urllib.request.urlopen(found.group(1) + "/health", timeout=10, context=context) as response:
                    assert response.status == 200
                    return
            except urllib.error.URLError as error:
                if isinstance(error.reason, ssl.SSLError):
                    raise
                time.sleep(0.1)  # it does not listen yet
        pytest.fail("nobody answered")


GAUGES = (
    "num_requests_running num_requests_waiting kv_cache_usage_perc cache_config_info lora_requests_info warmup_progress"
)
COUNTERS = """
    prompt_tokens prompt_tokens_cached generation_tokens request_success num_preemptions prefix_cache_queries prefix_cache_hits
    compilations recompilations_after_warmup padding_tokens device_idle_seconds compile_seconds
"""
HISTOGRAMS = """
    time_to_first_token_seconds inter_token_latency_seconds request_time_per_output_token_seconds e2e_request_latency_seconds
    request_queue_time_seconds request_inference_time_seconds request_prefill_time_seconds request_decode_time_seconds
    request_prompt_tokens request_generation_tokens request_params_n request_params_max_tokens iteration_tokens_total
"""


def test_metrics_have_the_names_and_labels_that_dashboards_know(server: Server) -> None:
    server.post("/v1/completions", SHORT)
    server.wait_idle()
    samples = [line for line in server.get("/metrics")[1].splitlines() if line.startswith("vllm:")]
    names = {re.split(r"[{ ]", line)[0] for line in samples}
    wanted = {f"vllm:{name}" for name in GAUGES.split()}
    wanted |= {f"vllm:{name}_total" for name in COUNTERS.split()}
    wanted |= {f"vllm:{name}_{part}" for name in HISTOGRAMS.split() for part in ("bucket", "sum", "count")}
    assert wanted - names == set()
    assert all('model_name="demo"' in line and 'engine="0"' in line for line in samples)
    assert re.search(r'vllm:cache_config_info{.*block_size="\d+".*num_gpu_blocks="\d+"', "\n".join(samples))
