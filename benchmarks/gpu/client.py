"""Ask a chat endpoint many times at once, and say how many tokens a second came back. A process of its own.

python -m benchmarks.gpu.client URL KEY MODEL --concurrency 128 --requests 512 --tokens 200 [--stream] [--ids]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time

import aiohttp


async def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="ends in /v1")
    parser.add_argument("key")
    parser.add_argument("model")
    parser.add_argument("--concurrency", type=int, default=128)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--words", type=int, default=200, help="of the question, drawn anew for each request")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--ids", action="store_true", help="ask for token ids and log-probabilities too")
    options = parser.parse_args()
    tokens = 0
    waiting = iter(range(options.requests))

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal tokens
        for number in waiting:
            tokens += await ask(session, options, number)

    headers = {"authorization": f"Bearer {options.key}"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=aiohttp.ClientTimeout()) as session:
        await ask(session, options, -1)  # the first request warms both sides up
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(options.concurrency)))
        seconds = time.perf_counter() - began
    print(json.dumps({"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}))


async def ask(session: aiohttp.ClientSession, options: argparse.Namespace, number: int) -> int:
    """Return how many tokens one answer has."""
    rng = random.Random(number)
    question = " ".join(rng.choice(["red", "green", "blue", "stone", "river"]) for _ in range(options.words))
    body = {
        "model": options.model,
        "messages": [{"role": "user", "content": f"{number} {question}"}],
        "max_tokens": options.tokens,
        "temperature": 1.0,
        "stream": options.stream,
    }
    if options.ids:
        body |= {"logprobs": True, "return_token_ids": True}
    if options.stream:
        body["stream_options"] = {"include_usage": True}
    async with session.post(f"{options.url}/chat/completions", json=body) as reply:
        if reply.status != 200:
            raise SystemExit(f"status {reply.status}: {await reply.text()}")
        if not options.stream:
            return int((await reply.json())["usage"]["completion_tokens"])
        found = 0
        async for line in reply.content:
            if line.startswith(b"data: {") and b'"usage"' in line:
                usage = json.loads(line[6:]).get("usage")
                found = int(usage["completion_tokens"]) if usage else found
        return found


if __name__ == "__main__":
    asyncio.run(main())
