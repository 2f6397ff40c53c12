"""The Ray examples: embeddings with one worker and with two, and the service under load, compared with transformers.

    python benchmarks/on_ray.py [--quick]

all-MiniLM-L6-v2 on the demo's sentences. Pools of one and of two workers, with one thread each, are interleaved; their
rates are compared while all workers of a pool compute, without the start. The two services run at the same time and are
loaded in turn: each computes on all cores but one, on which the clients, in this process, run. Writes
benchmarks/results/ray/<date>-<commit>.json.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

import ray
from ray import cloudpickle
from transformer_fast.benchmarks import results
from transformer_fast.benchmarks.timing import percentile

from transformer_fast.demo import load_sentences, locate

ROOT = pathlib.Path(__file__).resolve().parent.parent


def example(name: str):
    """Import an example as a module whose classes Ray pickles by value, like a script's."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)
    return module


def rate(answers: list[dict]) -> float:
    """Rows per second while all workers compute. Blocks that extend beyond this time count partly."""
    own: dict = {}
    for answer in answers:
        own.setdefault(answer["process"], []).append(answer)
    begin = max(min(a["began"] for a in some) for some in own.values())
    end = min(max(a["ended"] for a in some) for some in own.values())
    inside = [max(0.0, min(a["ended"], end) - max(a["began"], begin)) / (a["ended"] - a["began"]) for a in answers]
    return sum(a["rows"] * share for a, share in zip(answers, inside)) / (end - begin)


def scaling(rows: int, rounds: int) -> dict:
    """{workers: {rates (texts/s), cpu (CPU seconds per 1,000 texts)}} and the medians of the rounds' ratios."""
    embed_many = example("embed_many")
    sentences = load_sentences()
    whole, kept = embed_many.run, []

    def keep(*given):
        for answer in whole(*given):
            kept.append(answer)
            yield answer

    embed_many.run = keep
    found: dict = {workers: {"texts_per_s": [], "cpu_s_per_1000": []} for workers in (1, 2)}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "texts.txt"
        path.write_text("\n".join(sentences[i % len(sentences)] for i in range(rows)), encoding="utf-8")
        for turn in range(rounds):
            for workers in (1, 2) if turn % 2 else (2, 1):
                kept.clear()
                output = ["--output", f"{folder}/{turn}-{workers}", "--workers", str(workers)]
                report = embed_many.main(embed_many.parse(["--input", str(path), *output, "--block-rows", "256"]))
                assert report["done"] == rows and len(report["processes"]) == workers, report
                found[workers]["texts_per_s"].append(rate(kept))
                found[workers]["cpu_s_per_1000"].append(1000 * sum(a["cpu"] for a in kept) / rows)
    embed_many.run = whole
    pairs = list(zip(found[1]["texts_per_s"], found[2]["texts_per_s"]))
    costs = list(zip(found[1]["cpu_s_per_1000"], found[2]["cpu_s_per_1000"]))
    return {
        "rows": rows,
        "workers": found,
        "two_over_one": statistics.median(two / one for one, two in pairs),
        "two_over_one_by_cpu_time": statistics.median(2 * one / two for one, two in costs),
    }


async def load(url: str, requests: int, clients: int) -> tuple[float, list[float]]:
    """(seconds, latencies) of `requests` requests with one sentence each."""
    import aiohttp

    sentences = load_sentences()
    numbers, latencies = iter(range(requests)), []

    async def client(session) -> None:
        for number in numbers:
            start = time.perf_counter()
            async with session.post(url, json={"input": sentences[number % len(sentences)]}) as answer:
                body = await answer.json()
                assert answer.status == 200, body
            latencies.append(time.perf_counter() - start)

    limits = {"connector": aiohttp.TCPConnector(limit=clients), "timeout": aiohttp.ClientTimeout(120)}
    async with aiohttp.ClientSession(**limits) as session:
        start = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        return time.perf_counter() - start, latencies


def service(requests: int, clients: int, rounds: int) -> dict:
    serve_models = example("serve_models")
    names = ("transformer_fast", "transformers")
    port, cores = 8123, sorted(os.sched_getaffinity(0))
    threads = max(1, len(cores) - 1)
    for name in names:
        given = serve_models.parse(["--library", name, "--port", str(port), "--threads", str(threads)])
        serve_models.connect(given)
        serve_models.start(given, name, f"/{name}")
    os.sched_setaffinity(0, cores[-1:])  # only the clients: Ray and the services have started
    found: dict = {name: {"requests_per_s": [], "latencies": []} for name in names}
    for turn in range(-1, rounds):  # the first is a warm-up
        for name in names if turn % 2 else names[::-1]:
            url = f"http://127.0.0.1:{port}/{name}/v1/embeddings"
            seconds, latencies = asyncio.run(load(url, requests if turn >= 0 else requests // 4, clients))
            if turn >= 0:
                found[name]["requests_per_s"].append(requests / seconds)
                found[name]["latencies"] += latencies
    os.sched_setaffinity(0, cores)
    serve_models.serve.shutdown()
    for told in found.values():
        latencies = told.pop("latencies")
        told |= {f"p{q}_ms": 1000 * percentile(latencies, q) for q in (50, 99)}
    ours, theirs = (found[name]["requests_per_s"] for name in names)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs))
    about = {"requests": requests, "clients": clients, "threads": threads}
    return {**about, "services": found, "requests_per_s_over_transformers": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--root", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "ray")
    arguments = parser.parse_args()
    locate()  # raises if the checkpoint is not installed
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.pop("OMP_NUM_THREADS", None)
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, logging_level="warning")
    about = results.machine("cpu") | {"ray": ray.__version__}
    about.pop("threads")  # workers and replicas have their own
    quick = arguments.quick
    found = {"machine": about, "service": service(160 if quick else 320, 32, 1 if quick else 3)}
    found["scaling"] = scaling(2048 if quick else 6144, 1 if quick else 3)
    ray.shutdown()
    arguments.root.mkdir(parents=True, exist_ok=True)
    path = arguments.root / f"{about['time'][:10]}-{about['commit']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: found[key] for key in ("service", "scaling")}, indent=1))
    print(path)


if __name__ == "__main__":
    main()
