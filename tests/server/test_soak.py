"""Thousands of requests of every kind against one server, a third of them given up, while its settings change."""

import asyncio
import json
import random
import time

import aiohttp
import pytest

from quire.engine import SamplingParams
from tests.engine.engines import demo_engine
from tests.server.conftest import start_server
from tests.server.test_faults import engine_pid

NUM_REQUESTS = 2000
NUM_AT_ONCE = 48
SHARE_GIVEN_UP = 0.3
MAX_GROWTH_KB = (
    60_000  # between one third of the requests and the end; caches of texts and connections settle well below
)


class Soak:
    """Owns the tally: every request ends in exactly one way."""

    def __init__(self, url: str, admin_key: str, seed: int) -> None:
        self.url = url
        self.admin_key = admin_key
        self.random = random.Random(seed)
        self.ends: dict[int, str] = {}
        self.greedy: dict[tuple[str, int], set[str]] = {}
        self.memory: list[int] = []

    async def run(self, process_ids: list[int]) -> None:
        waiting = list(range(NUM_REQUESTS))
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            changes = asyncio.create_task(self._change_settings(session))

            async def worker() -> None:
                while waiting:
                    number = waiting.pop()
                    end = await self._request(session, number)
                    assert number not in self.ends, f"request {number} ended twice"
                    self.ends[number] = end
                    if len(self.ends) in (NUM_REQUESTS // 3, NUM_REQUESTS):
                        self.memory.append(sum(map(resident_kb, process_ids)))

            await asyncio.gather(*(worker() for _ in range(NUM_AT_ONCE)))
            changes.cancel()

    async def _request(self, session: aiohttp.ClientSession, number: int) -> str:
        choose = self.random
        prompt = "def f(" + "x, " * choose.randrange(60) + f"y{number % 7}):"
        length = choose.choice([1, 4, 16, 64])
        is_greedy = choose.random() < 0.5
        body = {
            "model": "demo",
            "prompt": prompt,
            "max_tokens": length,
            "temperature": 0 if is_greedy else 0.9,
            "stream": choose.random() < 0.5,
        }
        if not is_greedy and choose.random() < 0.2:
            body["n"] = 3
        if choose.random() < 0.2:
            body["logprobs"] = 3
        patience = None if choose.random() > SHARE_GIVEN_UP else choose.random() * 0.4
        try:
            async with asyncio.timeout(patience):
                text = await self._answer(session, body)
        except TimeoutError:
            return "given up"
        if is_greedy:
            self.greedy.setdefault((prompt, length), set()).add(text)
        return "answered"

    async def _answer(self, session: aiohttp.ClientSession, body: dict) -> str:
        async with session.post(self.url + "/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            if not body["stream"]:
                answer = await response.json()
                assert len(answer["choices"]) == body.get("n", 1)
                assert all(choice["finish_reason"] in ("stop", "length") for choice in answer["choices"])
                return answer["choices"][0]["text"]
            texts: dict[int, str] = {}
            ends = []
            async for line in response.content:
                data = line.decode().removeprefix("data: ").strip()
                if data and data != "[DONE]":
                    for choice in json.loads(data)["choices"]:
                        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
                        ends += [choice["index"]] if choice["finish_reason"] else []
            assert data == "" or data == "[DONE]"
            assert sorted(ends) == list(range(body.get("n", 1))), "every choice ends exactly once"
            return texts.get(0, "")

    async def _change_settings(self, session: aiohttp.ClientSession) -> None:
        headers = {"Authorization": f"Bearer {self.admin_key}"}
        while True:
            change = self.random.choice(
                [
                    {"max_num_seqs": self.random.randint(1, 8)},
                    {"batching": self.random.choice(["continuous", "windowed"])},
                ]
            )
            async with session.post(self.url + "/admin/scheduler", json=change, headers=headers) as response:
                assert response.status == 200, await response.text()
            await asyncio.sleep(0.25)


def resident_kb(process_id: int) -> int:
    """Memory of a process, in KiB."""
    with open(f"/proc/{process_id}/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.slow
def test_soak_loses_nothing_and_answers_nothing_twice() -> None:
    with start_server("--admin-key", "admin-secret") as server:
        soak = Soak(server.url, server.admin_key, seed=7)
        begin = time.monotonic()
        asyncio.run(soak.run([server.process.pid, engine_pid(server)]))
        ends = list(soak.ends.values())
        print(
            f"{len(ends)} requests in {time.monotonic() - begin:.0f} s, {ends.count('given up')} given up, "
            f"memory {soak.memory} KiB"
        )
        assert len(ends) == NUM_REQUESTS
        assert ends.count("given up") > 0.15 * NUM_REQUESTS
        server.wait_idle()
        metrics = server.metrics()
        assert metrics["vllm:recompilations_after_warmup_total"] == 0
        assert soak.memory[1] - soak.memory[0] < MAX_GROWTH_KB
    check_greedy(soak)


def check_greedy(soak: Soak) -> None:
    """A greedy request had one answer, whatever ran beside it, and it is the offline engine's."""
    assert all(len(texts) == 1 for texts in soak.greedy.values())
    keys = list(soak.greedy)
    params = [SamplingParams(temperature=0, max_tokens=length) for _, length in keys]
    outputs = demo_engine().generate([prompt for prompt, _ in keys], params, use_tqdm=False)
    assert [soak.greedy[key] for key in keys] == [{output.outputs[0].text} for output in outputs]
