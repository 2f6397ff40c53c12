"""Embeddings, classification and generation over HTTP on Ray Serve, with dynamic batching of requests.

    pip install 'transformer-fast[ray]'
    python examples/serve_models.py
    python examples/serve_models.py --embed FOLDER --classify FOLDER --generate FOLDER --port 8000

    curl localhost:8000/v1/embeddings -H 'content-type: application/json' -d '{"input": ["One text.", "Another."]}'
    curl localhost:8000/v1/classify -H 'content-type: application/json' -d '{"input": "One text."}'
    curl localhost:8000/v1/completions -H 'content-type: application/json' -d '{"prompt": "Once", "max_tokens": 20}'

/v1/embeddings and /v1/completions work with OpenAI's client: OpenAI(base_url="http://localhost:8000/v1").
Texts of requests that wait at the same time make one batch, short and long ones together: padding is not computed.
Invalid requests get 4xx; when --queue texts wait, the next request gets 429 at once.
"""

import argparse
import asyncio
import base64
import importlib.util
import os
import time
from typing import Annotated, Any, Literal

if importlib.util.find_spec("ray") is None or importlib.util.find_spec("fastapi") is None:
    raise SystemExit("This example runs on Ray Serve, which is not installed: pip install 'transformer-fast[ray]'")

import fastapi
import pydantic
from fastapi.exceptions import RequestValidationError
from ray import serve

WAIT = 0.003  # seconds that a text waits for others to share its batch


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    from transformer_fast.demo.checkpoint import given, locate

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embed", type=given, help="folder or name of an encoder; default, if none is named: MiniLM")
    parser.add_argument("--classify", type=given, help="folder or name of a text classifier")
    parser.add_argument("--generate", type=given, help="folder or name of a causal language model")
    parser.add_argument(
        "--library", choices=("transformer_fast", "transformers"), default="transformer_fast",
        help="whose models compute (default: transformer_fast)",
    )  # fmt: skip
    parser.add_argument("--pooling", choices=("mean", "cls", "last", "max"), default="mean", help="default: mean")
    parser.add_argument("--batch-size", type=int, default=32, help="texts computed at a time (default: 32)")
    parser.add_argument("--queue", type=int, default=256, help="texts that may wait in a replica (default: 256)")
    parser.add_argument("--inputs", type=int, default=128, help="texts of one request (default: 128)")
    parser.add_argument("--replicas", type=int, default=1, help="processes that each hold every model (default: 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a replica (default: %(default)s, all)")
    parser.add_argument("--host", default="127.0.0.1", help="of the service (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="of the service (default: 8000)")
    parser.add_argument("--address", help="of a Ray cluster: auto, or HOST:PORT; default: start Ray on this machine")
    said = parser.parse_args(arguments)
    for name in ("batch_size", "queue", "inputs", "replicas", "threads"):
        if getattr(said, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: wanted at least 1, got {getattr(said, name)}")
    said.names = {}  # model names in requests
    if not (said.embed or said.classify or said.generate):
        said.embed, said.names["embed"] = str(locate()), "all-MiniLM-L6-v2"
    for name in ("embed", "classify", "generate"):
        if value := getattr(said, name):
            value = os.path.abspath(value) if os.path.isdir(value) else value
            said.names.setdefault(name, os.path.basename(value))
            setattr(said, name, value)
    return said


# Requests

Text = Annotated[str, pydantic.Field(min_length=1)]
Tokens = Annotated[list[Annotated[int, pydantic.Field(ge=0, strict=True)]], pydantic.Field(min_length=1)]


class Embed(pydantic.BaseModel):
    input: Text | Tokens | Annotated[list[Text] | list[Tokens], pydantic.Field(min_length=1)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


class Classify(pydantic.BaseModel):
    input: Text | Annotated[list[Text], pydantic.Field(min_length=1)]
    model: str | None = None


class Complete(pydantic.BaseModel):
    prompt: Text | Annotated[list[Text], pydantic.Field(min_length=1)]
    model: str | None = None
    max_tokens: int = pydantic.Field(default=16, ge=1)


class Refused(Exception):
    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


def refusal(status: int, message: str, param: str | None = None) -> fastapi.responses.JSONResponse:
    """An error in OpenAI's format."""
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param, "code": status}
    headers = {"Retry-After": "1"} if status == 429 else None
    return fastapi.responses.JSONResponse({"error": error}, status, headers)


app = fastapi.FastAPI(title="transformer_fast")


@app.exception_handler(Refused)
async def _refused(_: fastapi.Request, error: Refused):
    return refusal(error.status, error.message, error.param)


@app.exception_handler(RequestValidationError)
async def _malformed(_: fastapi.Request, error: RequestValidationError):
    def named(loc) -> str:  # the argument and indices, without pydantic's names of the types in a union
        return ".".join(str(part) for n, part in enumerate(loc[1:]) if not n or isinstance(part, int))

    found = [(named(one["loc"]), one["msg"]) for one in error.errors()]
    return refusal(400, "; ".join(f"{where}: {what}" if where else what for where, what in found), found[0][0] or None)


# The models


class Task:
    """A model with its tokenizer, and the batch that is being collected."""

    def __init__(self, name: str, checkpoint: str, auto_model: str, library: Any):
        import transformers

        self.name, self.checkpoint = name, checkpoint
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        self.model = getattr(library, auto_model).from_pretrained(checkpoint).eval()
        limits = [self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", None)]
        self.longest = min((n for n in limits if n and n < 10**9), default=None)

    def tokens(self, given: str | list, param: str, room: int = 0) -> list[list[int]]:
        """The token ids of every text of a request; raises Refused if the model cannot read them."""
        whole = isinstance(given, str) or isinstance(given[0], int)
        texts: Any = [given] if whole else given
        rows = texts if isinstance(texts[0], list) else self.tokenizer(texts)["input_ids"]
        for i, row in enumerate(rows):
            if not row:
                raise Refused(400, f"{param}: number {i} has no tokens", param)
            if self.longest and len(row) + room > self.longest:
                more = f" and {room} new ones" if room else ""
                raise Refused(
                    400, f"{param}: number {i} has {len(row)} tokens{more}; the model takes {self.longest}", param
                )
            if max(row) >= self.model.config.vocab_size:
                raise Refused(400, f"{param}: number {i} has token {max(row)}; the model has fewer", param)
        return rows

    def padded(self, rows: list[list[int]], side: str = "right") -> dict:
        """{"input_ids", "attention_mask"}: (B, S)."""
        import torch

        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        fill = [longest - len(row) for row in rows]
        left = [n if side == "left" else 0 for n in fill]
        ids = [[pad] * a + row + [pad] * (n - a) for row, n, a in zip(rows, fill, left)]
        mask = [[0] * a + [1] * len(row) + [0] * (n - a) for row, n, a in zip(rows, fill, left)]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def until(row: list[int], ends: set) -> list[int]:
    """The tokens up to the first one that ends a text."""
    return next((row[:i] for i, token in enumerate(row) if token in ends), row)


def groups(sizes: list[tuple[int, int]], longest: int | None) -> list[list[int]]:
    """Group (tokens, new tokens) so that the longest prompt of a group has room for its largest number of new
    tokens."""
    found: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        group = [*found[-1], i] if found else [i]
        most = [max(sizes[j][k] for j in group) for k in (0, 1)]
        if found and (longest is None or sum(most) <= longest):
            found[-1] = group
        else:
            found.append([i])
    return found


@serve.deployment
@serve.ingress(app)
class Service:
    """All models of a replica. They compute in a thread, while requests are parsed and refused."""

    def __init__(self, arguments: argparse.Namespace):
        import torch
        import transformers

        import transformer_fast

        library = {"transformer_fast": transformer_fast, "transformers": transformers}[arguments.library]
        self.arguments = arguments
        self.waiting = self.texts = self.batches = 0
        self.tasks = {}
        torch.set_num_threads(arguments.threads)
        kinds = {
            "embed": "AutoModel",
            "classify": "AutoModelForSequenceClassification",
            "generate": "AutoModelForCausalLM",
        }
        for task, auto_model in kinds.items():
            if checkpoint := getattr(arguments, task):
                self.tasks[task] = Task(arguments.names[task], checkpoint, auto_model, library)
        for batch in (self.embed_batch, self.classify_batch, self.generate_batch):
            batch.set_max_batch_size(arguments.batch_size)

    # Ray Serve calls these with the texts of several requests, and returns each request its own answers.
    @serve.batch(max_batch_size=32, batch_wait_timeout_s=WAIT)
    async def embed_batch(self, rows: list[list[int]]) -> list:
        return await self.compute(self.compute_embeddings, rows)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=WAIT)
    async def classify_batch(self, rows: list[list[int]]) -> list:
        return await self.compute(self.compute_labels, rows)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=WAIT)
    async def generate_batch(self, rows: list[tuple[list[int], int]]) -> list:
        return await self.compute(self.compute_completions, rows)

    async def compute(self, how, rows: list) -> list:
        self.texts += len(rows)
        self.batches += 1
        return await asyncio.to_thread(how, rows)

    def compute_embeddings(self, rows: list[list[int]]) -> list:
        import transformer_fast

        task = self.tasks["embed"]
        options = {"pooling": self.arguments.pooling, "batch_size": len(rows)}
        return list(transformer_fast.layer_features(task.model, rows, task.tokenizer, **options).float().numpy())

    def compute_labels(self, rows: list[list[int]]) -> list[dict]:
        import torch

        task = self.tasks["classify"]
        with torch.inference_mode():
            logits = task.model(**task.padded(rows)).logits.float()
        config = task.model.config
        apart = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        scores = logits.sigmoid() if apart else logits.softmax(-1)
        names = config.id2label
        return [{names[i]: p for i, p in enumerate(row)} for row in scores.tolist()]

    def compute_completions(self, rows: list[tuple[list[int], int]]) -> list[list[int]]:
        """Generate the largest number of new tokens in the group for every prompt; then cut each to its own number."""
        task = self.tasks["generate"]
        ended = task.model.generation_config.eos_token_id
        ends = set(ended if isinstance(ended, list) else [ended])
        pad = task.tokenizer.pad_token_id or 0
        found: list = [None] * len(rows)
        for group in groups([(len(row), wish) for row, wish in rows], task.longest):
            prompts = task.padded([rows[i][0] for i in group], side="left")
            longest = max(rows[i][1] for i in group)
            made = task.model.generate(**prompts, max_new_tokens=longest, do_sample=False, pad_token_id=pad)
            for i, row in zip(group, made[:, prompts["input_ids"].shape[1] :].tolist()):
                found[i] = until(row[: rows[i][1]], ends)
        return found

    async def answer(self, batch, items: list) -> list:
        """The answers for all items of a request; 429 if they do not fit in the queue."""
        limit = self.arguments.queue
        if len(items) > min(self.arguments.inputs, limit):
            raise Refused(
                400, f"{len(items)} texts in one request; the service takes {min(self.arguments.inputs, limit)}"
            )
        if self.waiting + len(items) > limit:
            raise Refused(429, f"{self.waiting} texts wait already, and {limit} may; try again")
        self.waiting += len(items)
        try:
            return await asyncio.gather(*map(batch, items))
        finally:
            self.waiting -= len(items)

    def task(self, name: str, model: str | None) -> Task:
        if name not in self.tasks:
            raise Refused(404, f"this service was started without --{name}")
        task = self.tasks[name]
        if model not in (None, task.name, task.checkpoint):
            raise Refused(404, f"model: this service has {task.name!r}, got {model!r}", "model")
        return task

    @app.post("/v1/embeddings")
    async def embeddings(self, body: Embed) -> dict:
        task = self.task("embed", body.model)
        width = task.model.config.hidden_size
        if body.dimensions not in (None, width):
            raise Refused(400, f"dimensions: the model gives {width}, got {body.dimensions}", "dimensions")
        rows = task.tokens(body.input, "input")
        vectors = await self.answer(self.embed_batch, rows)
        coded = body.encoding_format == "base64"
        data = [
            {"object": "embedding", "index": i, "embedding": base64.b64encode(v.tobytes()) if coded else v.tolist()}
            for i, v in enumerate(vectors)
        ]
        count = sum(map(len, rows))
        return {
            "object": "list",
            "data": data,
            "model": task.name,
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }

    @app.post("/v1/classify")
    async def classify(self, body: Classify) -> dict:
        task = self.task("classify", body.model)
        found = await self.answer(self.classify_batch, task.tokens(body.input, "input"))
        data = [{"index": i, "label": max(row, key=row.get), "scores": row} for i, row in enumerate(found)]
        return {"object": "list", "data": data, "model": task.name}

    @app.post("/v1/completions")
    async def completions(self, body: Complete) -> dict:
        task = self.task("generate", body.model)
        rows = task.tokens(body.prompt, "prompt", body.max_tokens)
        found = await self.answer(self.generate_batch, [(row, body.max_tokens) for row in rows])
        choices = [
            {
                "index": i,
                "text": task.tokenizer.decode(row, skip_special_tokens=True),
                "finish_reason": "length" if len(row) == body.max_tokens else "stop",
                "logprobs": None,
            }
            for i, row in enumerate(found)
        ]
        asked, given = sum(map(len, rows)), sum(map(len, found))
        usage = {"prompt_tokens": asked, "completion_tokens": given, "total_tokens": asked + given}
        return {"object": "text_completion", "created": int(time.time()), "model": task.name, "choices": choices,
                "usage": usage}  # fmt: skip

    @app.get("/v1/models")
    async def models(self) -> dict:
        data = [{"id": t.name, "object": "model", "task": name} for name, t in self.tasks.items()]
        return {"object": "list", "data": data}

    @app.get("/v1/status")
    async def status(self) -> dict:
        """Of one replica: texts that wait, and the number of texts and batches so far."""
        return {"waiting": self.waiting, "texts": self.texts, "batches": self.batches}


def connect(arguments: argparse.Namespace) -> None:
    """Connect to the cluster, or start Ray on this machine, with Serve's HTTP server."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # by default Ray sends usage statistics
    if not ray.is_initialized():
        if arguments.address:
            ray.init(address=arguments.address, logging_level="warning")
        else:
            cores = max(arguments.replicas * arguments.threads, os.cpu_count() or 1)
            store = {"include_dashboard": False, "object_store_memory": 100 * 2**20}
            ray.init(num_cpus=cores, logging_level="warning", **store)
    serve.start(http_options={"host": arguments.host, "port": arguments.port})


def start(arguments: argparse.Namespace, name: str = "default", prefix: str = "/") -> None:
    """Start the service, and wait until it answers."""
    service = Service.options(
        num_replicas=arguments.replicas,
        ray_actor_options={"num_cpus": arguments.threads},
        # The service itself answers 429: Serve must pass it the requests that it refuses.
        max_ongoing_requests=16 * arguments.queue,
    )
    serve.run(service.bind(arguments), name=name, route_prefix=prefix)


def main(arguments: argparse.Namespace) -> None:
    connect(arguments)
    start(arguments)
    print(f"http://{arguments.host}:{arguments.port}/docs describes the requests; Ctrl-C ends it")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        serve.shutdown()


if __name__ == "__main__":
    main(parse())
