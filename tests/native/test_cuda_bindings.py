"""The bindings of the CUDA kernels and the host code that nvcc generates, up to each launch, without a GPU. They are
linked with a stand-in for CUDA's runtime (standin/runtime.cpp), and a stand-in for libtorch_cuda is loaded as Python
loads the real one."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import cuda_objects
import pytest
import torch

STANDIN = pathlib.Path(__file__).resolve().parent / "standin"
CUDA = next((p for p in (pathlib.Path(shutil.which(cuda_objects.NVCC) or "/").resolve().parent.parent,
                         pathlib.Path("/usr/local/cuda-13.0"), pathlib.Path("/usr/local/cuda"))
             if (p / "include" / "cuda_runtime_api.h").exists()), None)  # fmt: skip
BINDINGS = sorted((cuda_objects.CSRC / "bindings").glob("cuda_*.cpp"))
OPS = sorted({op for source in BINDINGS for op in re.findall(r'm\.impl\("(\w+)"', source.read_text())})

pytestmark = [
    cuda_objects.needs_nvcc,
    pytest.mark.skipif(CUDA is None, reason="there are no CUDA headers next to nvcc"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built with CUDA"),
]

PRELUDE = """
import contextlib, ctypes, json, sys
import torch
import transformer_fast as tf
from transformer_fast import backends
from transformer_fast.backends import native

reason = native.load()
assert not reason, reason
bindings, torch_cuda = sys.argv[1:]
torch.ops.load_library(bindings)
standin = ctypes.CDLL(bindings)
standin.standin_events.restype = ctypes.c_char_p
standin.standin_set.argtypes = ctypes.c_char_p, ctypes.c_uint64
settings = {}

def set(**values):
    for name, value in values.items():
        standin.standin_set(name.encode(), value)

def load_torch_cuda():
    library = ctypes.CDLL(torch_cuda)  # RTLD_LOCAL: names of it are not global
    library.standin_set_stream.argtypes = (ctypes.c_uint64,)
    assert not hasattr(ctypes.CDLL(None), "aoti_torch_get_current_cuda_stream")
    return library

found = {}

@contextlib.contextmanager
def noting(name):
    standin.standin_clear()
    error = ""
    try:
        with backends.backend("cuda"):
            yield
    except RuntimeError as reason:
        error = str(reason)
    events = json.loads("[" + standin.standin_events().decode() + "]")
    found[name] = {"events": events, "error": error, "left": standin.standin_last_error()}

def heads(h, s, d=64, dtype=torch.bfloat16, grad=True):
    return torch.randn(2, s, h, d).to(dtype).transpose(1, 2).requires_grad_(grad)
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """The bindings for CPU tensors, linked with the stand-in of the runtime, and the stand-in of libtorch_cuda.so."""
    folder = tmp_path_factory.mktemp("standin")
    cxx = os.environ.get("CXX", "g++")
    base = pathlib.Path(torch.__file__).parent
    includes = [f"-I{cuda_objects.CSRC}", f"-I{base}/include"]
    flags = [cxx, "-std=gnu++17", "-O0", "-fPIC", "-fvisibility=hidden", *includes]
    define = [
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f'-DTF_WITH_CUDA="{cuda_objects.LINKED}"',
        "-DTF_CPU_TENSORS",
    ]
    for source in BINDINGS:
        subprocess.run([*flags, *define, "-c", str(source), "-o", f"{folder}/{source.stem}.o"], check=True)
    runtime = [*flags, f"-I{CUDA}/include", "-c", str(STANDIN / "runtime.cpp"), "-o", f"{folder}/runtime.o"]
    subprocess.run(runtime, check=True)
    for source in cuda_objects.SOURCES:
        cuda_objects.compiled(source.name, cuda_objects.LINKED)
    objects = [*folder.glob("*.o"), *(cuda_objects.object_of(source.name) for source in cuda_objects.SOURCES)]
    bindings, torch_cuda = folder / "bindings.so", folder / "libtorch_cuda.so"
    link = [cxx, "-shared", "-Wl,-z,defs", *map(str, objects), f"-L{base}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([*link, "-o", str(bindings)], check=True)
    own_name = f"-Wl,-soname,{torch_cuda.name}"
    command = [cxx, "-shared", "-fPIC", own_name, str(STANDIN / "torch_cuda.cpp"), "-o", str(torch_cuda)]
    subprocess.run(command, check=True)
    return bindings, torch_cuda


@pytest.fixture
def run(libraries):
    def run(script: str) -> dict:
        script = PRELUDE + textwrap.dedent(script) + "\nprint('FOUND' + json.dumps(found))\n"
        environment = {**os.environ, "TRANSFORMER_FAST_CUDA_EMULATOR": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(cuda_objects.ROOT), environment.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", script, *map(str, libraries)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        return json.loads(result.stdout.rpartition("FOUND")[2])

    return run


def _kernels(found) -> list[str]:
    return [re.sub(r"^_ZN?\d*\w*?(norm|attention)_", r"\1_", event["kernel"]) for event in _of(found, "launch")]


def _of(found, kind) -> list[dict]:
    assert not found["error"], found["error"]
    return [event for event in found["events"] if event["kind"] == kind]


def _names(found, *parts) -> bool:
    """Whether the launched kernels have these parts in their names, in this order."""
    kernels = [event["kernel"] for event in _of(found, "launch")]
    assert len(kernels) == len(parts), kernels
    return all(part in kernel for part, kernel in zip(parts, kernels))


def test_every_op_reaches_its_launches_on_torch_s_stream(run):
    found = run("""
        torch_cuda = load_torch_cuda()
        torch_cuda.standin_set_stream(0xabc0)
        x, w, b = (torch.randn(n, requires_grad=True) for n in ((33, 256), (256,), (256,)))
        with noting("cuda_norm_forward"):
            y = tf.layer_norm(x, (256,), w, b)
        with noting("cuda_norm_backward"):
            torch.autograd.grad(y, (x, w), torch.ones_like(y))
        for name, dim, options in (("wgmma", 64, {}), ("causal", 128, {"is_causal": True}), ("mma", 80, {})):
            q, k, v = (heads(4, 300, dim) for _ in range(3))
            with noting("cuda_attention_forward " + name):
                out = tf.scaled_dot_product_attention(q, k, v, **options)
            with noting("cuda_attention_backward " + name):
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        with noting("cuda_bias_activation_forward"):
            y = tf.bias_activation(x, b, "silu", gate=x)
        with noting("cuda_bias_activation_backward"):
            torch.autograd.grad(y, (x, b), torch.ones_like(y))
        with noting("cuda_rotary"), torch.no_grad():
            tf.ops.rotary_embedding(torch.randn(2, 9, 4, 64), torch.randn(9, 32), torch.randn(9, 32))
        query, key, value = (heads(4, 1, grad=False) for _ in range(3))
        with noting("cuda_rotary_append"), torch.no_grad():
            room = [torch.zeros(2, 4, 9, 64, dtype=torch.bfloat16) for _ in range(2)]
            used, table = torch.tensor([5, 2]), torch.randn(9, 32)
            tf.rotary_cache_append(query, key, value, *room, used, table, table)
        caches = [torch.zeros(2, 4, 3000, 64, dtype=torch.bfloat16) for _ in range(2)]
        with noting("cuda_attention_decode"), torch.no_grad():
            tf.kv_cache_attention(query, key, value, *caches, torch.tensor([5, 2000]))
    """)
    assert {name.split()[0] for name in found} == set(OPS)
    for name, one in found.items():
        launches = _of(one, "launch")
        assert launches and all(launch["stream"] == 0xABC0 for launch in launches), name
        assert one["events"][0]["kind"] == "guard" and one["events"][-1]["kind"] == "unguard", name
    assert _names(found["cuda_norm_forward"], "norm_forward_kernel")
    assert _names(found["cuda_norm_backward"], "norm_backward_kernel", "norm_parameters_kernel")
    assert _names(found["cuda_attention_forward wgmma"], "attention_forward_wgmma_kernel")
    kernels = " ".join(launch["kernel"] for launch in _of(found["cuda_attention_backward wgmma"], "launch"))
    assert re.search(r"attention_backward_prepare.*attention_backward_wgmma.*attention_backward_finish", kernels)
    assert _names(found["cuda_attention_forward mma"], "attention_forward_mma_kernel")
    assert _names(found["cuda_attention_decode"], "attention_decode_kernel")
    assert _names(found["cuda_bias_activation_forward"], "bias_activation_forward_kernel")
    assert _names(found["cuda_bias_activation_backward"], "bias_activation_backward_kernel", "activation_bias_kernel")
    assert _names(found["cuda_rotary"], "rotary_kernel") and _names(found["cuda_rotary_append"], "rotary_append_kernel")
    persistent = _of(found["cuda_attention_forward wgmma"], "launch")[0]
    assert persistent["grid"] == [16, 1, 1] and 48 << 10 < persistent["shared"] <= 227 << 10


def test_without_torch_s_cuda_part_the_error_says_so(run):
    found = run("""
        with noting("norm"):
            tf.rms_norm(torch.randn(3, 256), (256,))
    """)
    assert "this torch was built without CUDA" in found["norm"]["error"]


def test_counters_are_cleared_once_a_stream_and_once_a_capture(run):
    found = run("""
        torch_cuda = load_torch_cuda()
        q = heads(8, 3000, 64, grad=False)
        cache = torch.zeros(2, 4, 3000, 64, dtype=torch.bfloat16)
        def causal(name):
            with noting(name), torch.no_grad():
                tf.scaled_dot_product_attention(q, q, q, is_causal=True)
        def decode(name):
            with noting(name), torch.no_grad():
                tf.scaled_dot_product_attention(cache[:, :, :1], cache, cache)
        causal("first"); causal("second"); decode("third")
        torch_cuda.standin_set_stream(0x20)
        decode("other stream"); decode("other stream again")
        set(capture=7)
        decode("capture"); causal("capture again")
        set(capture=8)
        decode("next capture")
        set(capture=0)
        decode("after")
        for stream in range(0x1000, 0x1000 + 200):
            torch_cuda.standin_set_stream(stream)
            decode("streams")
        set(capture_query_fails=1)
        torch_cuda.standin_set_stream(0)
        decode("unknown stream"); causal("unknown stream, causal")
    """)
    cleared = {name: len(_of(one, "memset")) for name, one in found.items()}
    assert cleared == {
        "first": 1, "second": 0, "third": 0, "other stream": 1, "other stream again": 0, "capture": 1,
        "capture again": 0,
        "next capture": 1, "after": 0, "streams": 1, "unknown stream": 0, "unknown stream, causal": 0,
    }  # fmt: skip
    # In a capture too: nothing is asked of CUDA that would break it.
    for name in ("third", "capture", "next capture"):
        assert _names(found[name], "attention_decode_kernel") and not _of(found[name], "capture broken")
    # If a stream's capture state cannot be queried, there are no counters, and a separate launch joins the parts.
    assert _names(found["unknown stream"], "attention_decode_kernel", "attention_decode_join_kernel")
    assert all(one["left"] == 0 for one in found.values())
    counters = {name: _of(found[name], "launch")[0]["counters"] for name in ("third", "other stream", "unknown stream")}
    assert counters["third"] != counters["other stream"] and counters["unknown stream"] == 0


@pytest.mark.parametrize("obstacle", ["refuses_decreasing_strides", "no_encode"])
def test_what_the_driver_does_not_describe_goes_to_the_other_kernels(run, obstacle):
    found = run(f"""
        load_torch_cuda()
        set({obstacle}=1)
        q, k, v = (heads(4, 300, 64) for _ in range(3))
        with noting("forward"):
            out = tf.scaled_dot_product_attention(q, k, v, is_causal=True)
        with noting("backward"):
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    """)
    for name in ("forward", "backward"):
        kernels = " ".join(event["kernel"] for event in _of(found[name], "launch"))
        assert "wgmma" not in kernels and f"attention_{name}" in kernels


def test_a_refused_launch_names_the_kernel_and_its_configuration(run):
    found = run("""
        load_torch_cuda()
        set(launch_fails=1)
        with noting("norm"):
            tf.rms_norm(torch.randn(3, 256), (256,))
    """)
    assert re.search(r"norm_forward_kernel.*grid \(1, 1, 1\), block \(", found["norm"]["error"])
    assert found["norm"]["left"] == 0
