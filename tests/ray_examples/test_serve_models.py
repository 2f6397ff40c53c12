"""examples/serve_models.py over HTTP: answers, batches of several requests, 4xx with the reason, 429 when full."""

import base64
import concurrent.futures
import contextlib
import importlib.util
import json
import os
import pathlib
import random
import runpy
import socket
import sys
import urllib.error
import urllib.request

import pytest
import torch

import transformer_fast as tf

if importlib.util.find_spec("ray") is None:
    pytest.skip("ray is not installed: pip install 'transformer-fast[ray]'", allow_module_level=True)

QUEUE = 16
BAD = [
    ("/v1/embeddings", b"{no json", 400, "JSON"),
    ("/v1/embeddings", {}, 400, "input: Field required"),
    ("/v1/embeddings", {"input": []}, 400, "at least 1 item"),
    ("/v1/embeddings", {"input": 7}, 400, "valid string"),
    ("/v1/embeddings", {"input": ["a", ""]}, 400, "at least 1 character"),
    ("/v1/embeddings", {"input": [5, 100000]}, 400, "number 0 has token 100000"),
    ("/v1/embeddings", {"input": "cat " * 80}, 400, "number 0 has 80 tokens; the model takes 64"),
    ("/v1/embeddings", {"input": ["cat"] * 9}, 400, "9 texts in one request; the service takes 8"),
    ("/v1/embeddings", {"input": "cat", "dimensions": 8}, 400, "the model gives 32, got 8"),
    ("/v1/embeddings", {"input": "cat", "model": "other"}, 404, "has 'embed', got 'other'"),
    ("/v1/completions", {"prompt": "cat", "max_tokens": 64}, 400, "and 64 new ones; the model takes 64"),
    ("/v1/completions", {"prompt": "cat", "max_tokens": 0}, 400, "greater than or equal to 1"),
    ("/v1/completions", {"prompt": 3}, 400, "prompt: Input should be a valid string"),
    ("/v1/nothing", {"input": "cat"}, 404, "Not Found"),
]


def free_port() -> int:
    """A port below the range of outgoing connections, so that no connection takes it before the service starts."""
    for port in random.Random(os.getpid()).sample(range(20000, 32768), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


@pytest.fixture(scope="module")
def ask(example, checkpoints):
    """(status, answer) of a request to a service with three models and a short queue."""
    serve_models = example("serve_models")
    port = free_port()
    models = [word for name in ("embed", "classify", "generate") for word in (f"--{name}", str(checkpoints[name]))]
    limits = ["--queue", str(QUEUE), "--inputs", "8", "--threads", "1", "--port", str(port)]
    arguments = serve_models.parse([*models, *limits])
    serve_models.connect(arguments)
    serve_models.start(arguments)

    def send(path, body=None):
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=500) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    yield send
    serve_models.serve.shutdown()


def embeddings(ask, texts, checkpoints):
    model, tokenizer = (a.from_pretrained(checkpoints["embed"]) for a in (tf.AutoModel, tf.AutoTokenizer))
    expected = tf.layer_features(model, texts[:5], tokenizer, pooling="mean")
    status, answer = ask("/v1/embeddings", {"input": texts[:5], "model": "embed"})
    assert status == 200 and answer["object"] == "list" and [d["index"] for d in answer["data"]] == [0, 1, 2, 3, 4]
    torch.testing.assert_close(torch.tensor([d["embedding"] for d in answer["data"]]), expected)
    assert ask("/v1/embeddings", {"input": "cat", "model": str(checkpoints["embed"])})[0] == 200
    rows = tokenizer(texts[:5])["input_ids"]
    assert answer["usage"] == {key: sum(map(len, rows)) for key in ("prompt_tokens", "total_tokens")}
    for given in (rows[0], texts[0]):  # token ids; one text; OpenAI's client asks for base64
        status, answer = ask("/v1/embeddings", {"input": given, "encoding_format": "base64", "dimensions": 32})
        found = torch.frombuffer(bytearray(base64.b64decode(answer["data"][0]["embedding"])), dtype=torch.float32)
        torch.testing.assert_close(found, expected[0])


def labels_and_completions(ask, texts, checkpoints):
    read = tf.pipeline("text-classification", model=str(checkpoints["classify"]))
    status, answer = ask("/v1/classify", {"input": texts[:6]})
    assert status == 200
    for found, wanted in zip(answer["data"], read(texts[:6])):
        assert found["label"] == wanted["label"]
        assert found["scores"][wanted["label"]] == pytest.approx(wanted["score"], abs=1e-5)
    model, tokenizer = (a.from_pretrained(checkpoints["generate"]) for a in (tf.AutoModelForCausalLM, tf.AutoTokenizer))
    status, answer = ask("/v1/completions", {"prompt": texts[:4], "max_tokens": 6})
    assert status == 200
    for text, found in zip(texts, answer["choices"]):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        whole = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert found["text"] == tokenizer.decode(whole, skip_special_tokens=True)
    assert ask("/v1/models")[1]["data"][2]["id"] == "generate"


def a_long_prompt_takes_no_room_from_a_short_one(ask, texts, checkpoints):
    groups = sys.modules["serve_models"].groups
    assert groups([(60, 4), (3, 40), (20, 40), (5, 2)], 64) == [[1, 3, 2], [0]]
    assert groups([(60, 4), (3, 40)], None) == [[1, 0]]
    assert groups([(60, 4), (3, 40), (3, 61)], 64) == [[1, 2], [0]]


def requests_share_batches(ask, texts, checkpoints):
    for _ in range(20):  # on a busy machine they may arrive one at a time
        before = ask("/v1/status")[1]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda t: ask("/v1/embeddings", {"input": t}), texts))
        assert all(status == 200 for status, _ in answers)
        after = ask("/v1/status")[1]
        assert after["texts"] - before["texts"] == len(texts) and after["waiting"] == 0
        if after["batches"] - before["batches"] < len(texts):
            return
    pytest.fail("no two requests shared a batch")


def bad_requests_say_why(ask, texts, checkpoints):
    for path, body, status, reason in BAD:
        code, answer = ask(path, body)
        assert code == status and reason in json.dumps(answer), (body, answer)


def a_full_queue_says_429_and_what_was_taken_is_answered(ask, texts, checkpoints):
    body, answers = {"prompt": [text[:20] for text in texts[:8]], "max_tokens": 40}, []
    for _ in range(20):  # as above
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            answers += pool.map(lambda _: ask("/v1/completions", body), range(48))
        codes = {status for status, _ in answers}
        if 429 in codes:
            break
    assert codes == {200, 429}
    assert all("16 may" in answer["error"]["message"] for status, answer in answers if status == 429)
    assert ask("/v1/status")[1]["waiting"] == 0 and ask("/v1/embeddings", {"input": "cat"})[0] == 200


def test_the_service(ask, texts, checkpoints, subtests):
    """A single test, so that the service starts once, regardless of how tests are distributed over processes."""
    checks = (
        embeddings,
        labels_and_completions,
        a_long_prompt_takes_no_room_from_a_short_one,
        requests_share_batches,
        bad_requests_say_why,
        a_full_queue_says_429_and_what_was_taken_is_answered,
    )
    for check in checks:
        with subtests.test(check.__name__):
            check(ask, texts, checkpoints)


def test_without_ray_it_says_what_to_install(monkeypatch):
    path = pathlib.Path(__file__).resolve().parents[2] / "examples" / "serve_models.py"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'transformer-fast\[ray\]'"):
        runpy.run_path(str(path))
