"""`quire bench serve`: load on a running server, as its clients make it, and what they feel of it."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tqdm import tqdm

from quire.bench.offline import length_range
from quire.bench.openai_client import ApiError, OpenAIClient
from quire.kernels.errors import InvalidConfigError, NotServingError

PERCENTILES = (50, 90, 95, 99)


@dataclass
class Record:
    """One request, as its client saw it. Times in seconds; `inter_token` is from each event with tokens to the next."""

    num_prompt_tokens: int
    num_output_tokens: int = 0
    ttft: float | None = None
    e2e: float | None = None
    inter_token: list[float] = field(default_factory=list)
    error: str | None = None
    message: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    """All that is looked at of an event: decoding less leaves more of the machine to the server."""

    usage: _Usage | None = None


_decoder = msgspec.json.Decoder(_Chunk)


@dataclass(frozen=True)
class Workload:
    """What is sent. Prompts are random token ids, so that their lengths are exact and nothing is found cached."""

    prompts: tuple[tuple[int, ...], ...]
    output_lens: tuple[int, ...]
    temperature: float

    @classmethod
    def make(
        cls,
        count: int,
        input_len: Sequence[int],
        output_len: Sequence[int],
        vocab_size: int,
        temperature: float,
        seed: int,
    ) -> Workload:
        """`count` requests with lengths drawn evenly from the two closed ranges."""
        rng = np.random.default_rng(seed)
        lens = rng.integers(input_len[0], input_len[1] + 1, count)
        prompts = tuple(tuple(rng.integers(3, vocab_size, size).tolist()) for size in lens)
        outputs = tuple(rng.integers(output_len[0], output_len[1] + 1, count).tolist())
        return cls(prompts, outputs, temperature)

    def body(self, idx: int, model: str) -> dict[str, Any]:
        """The request's JSON."""
        return {
            "model": model,
            "prompt": self.prompts[idx],
            "max_tokens": self.output_lens[idx],
            "temperature": self.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser("serve", help="load on a running server: latencies, throughput, goodput")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--api-key", help="key that the server asks for")
    parser.add_argument("--num-requests", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument(
        "--concurrency", type=int, default=16, help="closed loop: so many at once (default: %(default)s)"
    )
    parser.add_argument("--request-rate", type=float, help="open loop instead: Poisson arrivals, requests per second")
    parser.add_argument(
        "--input-len", type=length_range, default=(16, 128), help="tokens of a prompt, LOW-HIGH (default: 16-128)"
    )
    parser.add_argument(
        "--output-len", type=length_range, default=(16, 128), help="tokens of an output, LOW-HIGH (default: 16-128)"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=1000, help="prompts are of token ids below this (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="of every request (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=4, help="requests before the clock starts (default: %(default)s)")
    parser.add_argument(
        "--goodput", default="ttft=2.0,itl=0.2", help="promise: ttft, itl (mean), e2e in seconds (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of lengths, prompts and arrivals (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, help="also write the line, with a record per request, for quire bench compare"
    )
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Sends the load, prints one JSON line; 1 when no request succeeded."""
    promise = parse_promise(namespace.goodput)
    report, records = asyncio.run(_measure(namespace, promise))
    print(json.dumps(report))
    if namespace.output is not None:
        namespace.output.write_text(json.dumps({**report, "records": [dataclasses.asdict(r) for r in records]}) + "\n")
    return 0 if report["completed"] else 1


def parse_promise(text: str) -> dict[str, float]:
    """`ttft=2.0,itl=0.1` as a dict. Raises InvalidConfigError for anything else."""
    promise = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            promise[name.strip()] = float(value)
        except ValueError:
            promise[name.strip()] = -1.0
        if name.strip() not in ("ttft", "itl", "e2e") or not promise[name.strip()] > 0:
            raise InvalidConfigError(f"goodput={text!r} is not of the form ttft=SECONDS,itl=SECONDS,e2e=SECONDS")
    return promise


async def _measure(namespace: argparse.Namespace, promise: dict[str, float]) -> tuple[dict[str, Any], list[Record]]:
    arguments = (namespace.input_len, namespace.output_len, namespace.vocab_size, namespace.temperature)
    async with OpenAIClient(namespace.url, namespace.api_key) as client:
        model = await client.model()
        warm_up = Workload.make(namespace.warmup, *arguments, namespace.seed + 1)
        await asyncio.gather(*(_request(client, warm_up, idx, model) for idx in range(namespace.warmup)))
        workload = Workload.make(namespace.num_requests, *arguments, namespace.seed)
        with tqdm(total=namespace.num_requests, desc="requests", file=sys.stderr, dynamic_ncols=True) as bar:
            begin = time.perf_counter()
            if namespace.request_rate:
                records = await _open_loop(client, workload, model, namespace.request_rate, namespace.seed, bar)
            else:
                records = await _closed_loop(client, workload, model, namespace.concurrency, bar)
            seconds = time.perf_counter() - begin
    if failed := next((record for record in records if record.error), None):
        print(f"the first error: {failed.message}", file=sys.stderr)
    report = summarize(records, seconds, promise)
    settings = ("num_requests", "concurrency", "request_rate", "input_len", "output_len", "temperature", "seed")
    return {
        "benchmark": "serve",
        "model": model,
        **{name: getattr(namespace, name) for name in settings},
        **report,
    }, records


async def _request(client: OpenAIClient, workload: Workload, idx: int, model: str) -> Record:
    record = Record(len(workload.prompts[idx]))
    begin = last = time.perf_counter()
    try:
        async for data in client.stream("/v1/completions", workload.body(idx, model)):
            usage = _decoder.decode(data).usage
            now = time.perf_counter()
            if usage is None or usage.completion_tokens <= record.num_output_tokens:
                continue  # the last event has no tokens
            if record.ttft is None:
                record.ttft = now - begin
            else:
                record.inter_token.append(now - last)
            record.num_output_tokens, last = usage.completion_tokens, now
        record.e2e = time.perf_counter() - begin
    except ApiError as error:
        record.error, record.message = str(error.status) if error.status != 200 else "in stream", str(error)
    except (NotServingError, TimeoutError) as error:
        record.error, record.message = type(error).__name__, str(error)
    return record


async def _closed_loop(
    client: OpenAIClient, workload: Workload, model: str, concurrency: int, bar: tqdm[Any]
) -> list[Record]:
    """So many clients, each of which sends its next request when the last one was answered."""
    waiting = list(range(len(workload.prompts)))[::-1]
    records: dict[int, Record] = {}

    async def worker() -> None:
        while waiting:
            idx = waiting.pop()
            records[idx] = await _request(client, workload, idx, model)
            bar.update()

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return [records[idx] for idx in range(len(workload.prompts))]


async def _open_loop(
    client: OpenAIClient, workload: Workload, model: str, rate: float, seed: int, bar: tqdm[Any]
) -> list[Record]:
    """Requests arrive whether or not earlier ones were answered, at exponential intervals."""
    gaps = np.random.default_rng(seed).exponential(1.0 / rate, len(workload.prompts))
    arrivals = np.cumsum(gaps)
    begin = time.perf_counter()

    async def request(idx: int) -> Record:
        record = await _request(client, workload, idx, model)
        bar.update()
        return record

    tasks = []
    for idx, arrival in enumerate(arrivals):
        await asyncio.sleep(max(begin + arrival - time.perf_counter(), 0.0))
        tasks.append(asyncio.create_task(request(idx)))
    return list(await asyncio.gather(*tasks))


def summarize(records: Sequence[Record], seconds: float, promise: dict[str, float]) -> dict[str, Any]:
    """Percentiles in seconds, rates per second, errors by kind, and the share of requests that kept the promise."""
    done = [record for record in records if record.error is None]
    errors: dict[str, int] = {}
    for record in records:
        if record.error is not None:
            errors[record.error] = errors.get(record.error, 0) + 1
    num_kept = sum(keeps(record, promise) for record in done)
    num_output = sum(record.num_output_tokens for record in done)
    return {
        "seconds": round(seconds, 3),
        "completed": len(done),
        "errors": errors,
        "requests_per_s": round(len(done) / seconds, 3),
        "output_tokens_per_s": round(num_output / seconds, 2),
        "total_tokens_per_s": round((num_output + sum(record.num_prompt_tokens for record in done)) / seconds, 2),
        "goodput": {
            "promise": promise,
            "requests_per_s": round(num_kept / seconds, 3),
            "share": _share(num_kept, records),
        },
        "ttft_s": percentiles([record.ttft for record in done if record.ttft is not None]),
        "itl_s": percentiles([gap for record in done for gap in record.inter_token]),
        "e2e_s": percentiles([record.e2e for record in done if record.e2e is not None]),
    }


def _share(count: int, records: Sequence[Record]) -> float:
    return round(count / len(records), 4) if records else 0.0


def keeps(record: Record, promise: dict[str, float]) -> bool:
    """Whether a request kept all of the promise; `itl` is its mean."""
    mean = sum(record.inter_token) / len(record.inter_token) if record.inter_token else 0.0
    found = {"ttft": record.ttft, "itl": mean, "e2e": record.e2e}
    return all((value := found[name]) is not None and value <= limit for name, limit in promise.items())


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles; empty where there is nothing."""
    if not values:
        return {}
    found = np.percentile(values, PERCENTILES)
    return {"mean": round(float(np.mean(values)), 5)} | {
        f"p{name}": round(float(value), 5) for name, value in zip(PERCENTILES, found, strict=True)
    }
