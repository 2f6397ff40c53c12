"""Launch plans repeat the launches of Triton's own launcher with other tensors. Nothing is compiled or run."""

import csv
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU"),
]
ROOT = pathlib.Path(__file__).resolve().parent.parent

PRELUDE = """
import json, re, torch
import transformer_fast as tf
from transformer_fast.benchmarks import host_time
driver = host_time.install()
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from transformer_fast.backends import triton_launch

torch.manual_seed(0)
launches, known = [], {}

class Compiled(CompiledKernel):
    \"\"\"In the place of a kernel that was compiled for these arguments.\"\"\"
    def __init__(self, name, kind):
        self.name, self.kind, self.function, self.packed_metadata, self.module = name, kind, 1, None, None
    def __del__(self):
        pass
    def launch_metadata(self, *_):
        return None
    @property
    def run(self):
        return self.launch
    def launch(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        kinds = re.findall(r"\\('([*\\w]+)',", self.kind)[:len(arguments)]  # pointers are '*bf16' and the like
        assert len(kinds) == len(arguments)
        addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        values = [known.get(a, "made here") if k.startswith("*") else a for k, a in zip(kinds, addresses)]
        launches.append([self.name, self.kind, [x, y, z], [str(v) for v in values]])

def compiled(self, key, signature, device, constexprs, options, attrs, warmup):
    kernel = Compiled(self.fn.__name__, key)
    self.device_caches[device][0][key] = kernel
    return kernel

JITFunction._do_compile = compiled
doors = []
front = JITFunction.run
def run(self, *a, **k):
    doors.append(1)
    return front(self, *a, **k)
JITFunction.run = run

def trace(call, tensors):
    \"\"\"Launches of call(**tensors) and its gradients, tensors by their names, and how many Triton made itself.\"\"\"
    launches.clear(), doors.clear(), known.clear()
    leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    known.update({t.data_ptr(): n for n, t in leaves.items()})
    torch.manual_seed(3)
    with tf.backend("triton"):
        out = call(**leaves)
        wanted = [t for t in leaves.values() if t.requires_grad]
        if out.requires_grad:
            torch.autograd.grad(out, wanted, torch.ones_like(out))
    return [list(l) for l in launches], len(doors)

def heads(n=4, s=40, d=32):
    return torch.randn(2, s, n, d).bfloat16().transpose(1, 2)

def clones(tensors):
    return {n: t.clone(memory_format=torch.preserve_format) for n, t in tensors.items()}
"""


def _run(script: str):
    script = PRELUDE + textwrap.dedent(script) + "\nprint('FOUND' + json.dumps(found))\n"
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET",)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("FOUND")[2])


def test_plans_repeat_what_triton_s_launcher_is_asked_for():
    found = _run("""
        sdpa = tf.scaled_dot_product_attention
        calls = {
            "causal": (lambda q, k, v: sdpa(q, k, v, is_causal=True), dict(q=heads(), k=heads(), v=heads())),
            "rich": (lambda q, k, v, b, m: sdpa(q, k, v, bias=b, attn_mask=m, enable_gqa=True, dropout_p=0.2), dict(
                q=heads(), k=heads(2), v=heads(2), b=torch.randn(1, 4, 40, 40), m=torch.rand(2, 1, 1, 40) > 0.2)),
            "table": (lambda q, k, v, t: sdpa(q, k, v, relative_bias=tf.RelativeBias(t, 20, True)), dict(
                q=heads(), k=heads(), v=heads(), t=torch.randn(8, 4))),
            "lengths": (lambda q, k, v, n: sdpa(q, k, v, key_lengths=n), dict(
                q=heads(s=1), k=heads(s=900), v=heads(s=900), n=torch.tensor([900, 7]))),
            "unpadded": (lambda q, k, v, c: tf.varlen_attention(q, k, v, c, max_seqlen_q=30), dict(
                q=torch.randn(50, 2, 32).half(), k=torch.randn(50, 2, 32).half(), v=torch.randn(50, 2, 32).half(),
                c=torch.tensor([0, 30, 50], dtype=torch.int32))),
            "layer_norm": (lambda x, w, b: tf.layer_norm(x, (64,), w, b), dict(
                x=torch.randn(9, 64), w=torch.randn(64), b=torch.randn(64))),
            "add_rms_norm": (lambda x, r, w: tf.add_rms_norm(x, r, w)[0], dict(
                x=torch.randn(9, 64), r=torch.randn(9, 64), w=torch.randn(64))),
            "activation": (lambda x, b: tf.bias_activation(x, b), dict(x=torch.randn(9, 64), b=torch.randn(64))),
        }
        found = {}
        for name, (call, tensors) in calls.items():
            first = trace(call, tensors)
            again = trace(call, clones(tensors))
            triton_launch.forget()
            found[name] = [first, again, trace(call, clones(tensors))]
    """)
    for name, ((first, doors), (again, doors_again), (anew, doors_anew)) in found.items():
        assert first and first == again == anew, name
        assert doors == doors_anew == len(first), name
        assert doors_again == 0, f"{name}: Triton's launcher has chosen the kernels once"


def test_a_plan_serves_no_other_kind_of_call():
    found = _run("""
        call = lambda q, k, v, **more: tf.scaled_dot_product_attention(q, k, v, **more)
        x = heads()
        tensors = dict(q=heads(), k=heads(), v=heads())
        found = {}
        trace(lambda q: call(q, q, q), dict(q=x))
        found["apart"] = trace(call, tensors)
        odd = torch.randn(2 * 4 * 40 * 32 + 1).bfloat16()[1:].view(2, 4, 40, 32)
        even = torch.randn(2 * 4 * 40 * 32).bfloat16().view(2, 4, 40, 32)
        found["even"] = trace(call, tensors | dict(k=even))
        found["odd"] = trace(call, tensors | dict(k=odd))
        found["scaled"] = trace(lambda **t: call(**t, scale=0.7), tensors)
        found["longer"] = trace(call, dict(q=heads(s=41), k=heads(), v=heads()))
        single = {n: t.float() for n, t in tensors.items()}
        found["ieee"] = trace(call, single)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        found["tf32"] = trace(call, single)
    """)
    query, key = found["apart"][0][0][3][:2]
    assert (query, key) == ("q", "k"), "a call of one tensor three times over made a plan for such calls alone"
    forward = {name: launches[0] for name, (launches, _) in found.items()}
    assert forward["odd"][1] != forward["even"][1], "Triton has another kernel for rows off 16 bytes"
    assert forward["scaled"][3] != forward["apart"][3] != forward["longer"][3]
    assert forward["ieee"][3] != forward["tf32"][3]


def test_the_docs_have_the_newest_host_times():
    """A call takes at most 15 us more than bare launches through Triton's own launcher, gradients at most 30 us."""
    file = max((ROOT / "benchmarks" / "results" / "host-time").glob("*.csv"))
    rows = list(csv.DictReader(file.open(newline="")))
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert file.name in page and rows[0]["commit"][:7] in file.name
    for row in rows:
        assert float(row["over_us"]) <= (30 if "backward" in row["call"] else 15), row["call"]
        assert f"| {row['call']} | {row['us']} | {row['bare_us']} ({row['launches']}) | {row['over_us']} |" in page
