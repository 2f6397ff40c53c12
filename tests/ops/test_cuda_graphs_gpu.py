"""The Triton ops inside CUDA graphs, torch.compile and autocast, forward and backward. Not yet run on a GPU."""

import pytest
import torch

import transformer_fast as tf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine"),
]


def _attention(q, k, v, bias, table):
    return tf.scaled_dot_product_attention(
        q, k, v, is_causal=True, bias=bias, relative_bias=tf.RelativeBias(table, 20, False), return_lse=True
    )


def _embedding(word, position, weight, bias):
    ids = torch.arange(8, device=word.device).view(2, 4)
    return tf.embedding_layer_norm(ids, word, ids % 4, position, norm_weight=weight, norm_bias=bias)


HEADS = (2, 4, 70, 64)
# name -> (function, shapes of its arguments)
CALLS = {
    "attention": (_attention, [HEADS, HEADS, HEADS, (1, 4, 70, 70), (8, 4)]),
    "layer_norm": (lambda x, w, b: tf.layer_norm(x, (256,), w, b), [(33, 256), (256,), (256,)]),
    "add_rms_norm": (lambda x, r, w: tf.add_rms_norm(x, r, w), [(33, 256), (33, 256), (256,)]),
    "bias_activation": (lambda x, b: tf.bias_activation(x, b, "gelu"), [(33, 256), (256,)]),
    "cross_entropy": (
        lambda x: tf.cross_entropy(x, torch.arange(33, device=x.device), label_smoothing=0.1),
        [(33, 300)],
    ),
    "embedding_layer_norm": (_embedding, [(9, 64), (6, 64), (64,), (64,)]),
    "additive_attention": (tf.additive_attention, [(2, 5, 32), (2, 9, 32), (2, 9, 48), (32,)]),
}


@pytest.fixture(autouse=True)
def _triton():
    with tf.backend("triton"):
        yield


def _leaves(shapes, dtype=torch.float16):
    return [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]


def _step(function, leaves):
    """The outputs and the gradients of all leaves."""
    found = function(*leaves)
    outs = found if isinstance(found, tuple) else (found,)
    return *outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])


def _captured(step):
    """A CUDA graph of step(), and its outputs in static memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    return graph, outs


@pytest.mark.parametrize("name", CALLS)
def test_a_captured_step_follows_its_inputs(name):
    function, shapes = CALLS[name]
    leaves = _leaves(shapes)
    graph, outs = _captured(lambda: _step(function, leaves))
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    found = [out.clone() for out in outs]
    assert all(map(torch.equal, found, _step(function, leaves)))


def test_every_replay_draws_its_own_dropout():
    leaves = _leaves([HEADS] * 3)
    graph, outs = _captured(
        lambda: _step(lambda q, k, v: tf.scaled_dot_product_attention(q, k, v, dropout_p=0.5), leaves)
    )
    runs = []
    for _ in range(2):
        graph.replay()
        runs.append(outs[0].clone())
    assert not torch.equal(*runs)


def test_decoding_on_a_cache_is_captured():
    query, key, value = (torch.randn(2, heads, 1, 64, device="cuda").half() for heads in (4, 2, 2))
    caches = [torch.zeros(2, 2, 300, 64, device="cuda").half() for _ in range(2)]
    lengths = torch.tensor([3, 250], device="cuda")
    with torch.no_grad():
        graph, out = _captured(lambda: tf.kv_cache_attention(query, key, value, *caches, lengths))
        lengths += 1
        graph.replay()
        found = out.clone()
        assert torch.equal(found, tf.kv_cache_attention(query, key, value, *caches, lengths))
    assert torch.equal(caches[0][0, :, 4], key[0, :, 0]) and torch.equal(caches[0][1, :, 251], key[1, :, 0])


@pytest.mark.parametrize("name", ["attention", "layer_norm", "bias_activation"])
def test_one_graph_under_compile_and_autocast(name):
    function, shapes = CALLS[name]
    leaves = _leaves(shapes, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        wanted = _step(function, leaves)
        found = _step(torch.compile(function, fullgraph=True), leaves)
    assert all(map(torch.equal, found, wanted))
