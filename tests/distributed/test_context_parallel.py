"""Attention over a sequence split over two and four processes equals that of one process."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from context_parallel_cases import CASES, Case
from numerics import GRADIENT, OUTPUT, assert_as_accurate
from torch.distributed.device_mesh import init_device_mesh

import transformer_fast as tf

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no torch.distributed with gloo"
)
METHODS = ("ring", "ulysses")


def work(rank: int, world: int, rendezvous: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for method in METHODS:
        for case in CASES:
            cp = tf.distributed.context_parallel(mesh, method=method, load_balance=case.load_balance)
            try:
                found[method, case.name] = case.spread(cp)
            except NotImplementedError as error:  # in all processes
                found[method, case.name] = str(error)
        found[method, "saved"] = saved_bytes(tf.distributed.context_parallel(mesh, method=method))
        found[method, "dropout"] = dropout(tf.distributed.context_parallel(mesh, method=method))
    found["refusals"] = refusals(mesh)
    if rank == 0:
        torch.save(found, result)
    dist.barrier()
    dist.destroy_process_group()


def saved_bytes(cp) -> int:
    """The bytes that a causal call keeps for backward in this process."""
    kept = 0

    def pack(t):
        nonlocal kept
        kept += t.numel() * t.element_size()
        return t

    q, k, v = (cp.shard(torch.randn(1, 4, 256, 16), 2).requires_grad_() for _ in range(3))
    with cp, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        tf.scaled_dot_product_attention(q, k, v, is_causal=True)
    return kept


def dropout(cp) -> dict[str, torch.Tensor]:
    """Equal weights and values of 1, so that out is the kept share; and a check that backward uses the same mask."""
    torch.manual_seed(0)  # the same in every process
    q = cp.shard(torch.zeros(2, 4, 128, 8), 2)
    v = torch.ones_like(q).requires_grad_()
    with cp:
        out = tf.scaled_dot_product_attention(q, q, v, dropout_p=0.25)
        out.sum().backward()
    both = [torch.zeros_like(out) for _ in range(cp.size)]
    dist.all_gather(both, out.detach().contiguous())
    sums = torch.stack([out.detach().sum(), v.grad.sum()])
    dist.all_reduce(sums)
    return {"out": both, "sums": sums}


def refusals(mesh) -> dict[str, str]:
    q = torch.randn(1, 3, 8, 8)
    ids = torch.tensor([0, 8], dtype=torch.int32)
    calls = {
        "heads": ("ulysses", lambda: tf.scaled_dot_product_attention(q, q, q)),
        "odd": ("ring", lambda: tf.scaled_dot_product_attention(*[q[:, :, :5]] * 3, is_causal=True)),
        "mask": ("ring", lambda: tf.scaled_dot_product_attention(q, q, q, torch.ones(8, 8, dtype=torch.bool))),
        "cache": ("ring", lambda: tf.kv_cache_attention(q, q, q, q, q, ids[:1])),
        "probabilities": ("ring", lambda: tf.attention_probabilities(q, q, torch.zeros(1, 3, 8))),
        "additive": ("ring", lambda: tf.additive_attention(q[:, 0], q[:, 0], q[:, 0], torch.ones(8))),
        "length": ("ring", lambda: tf.distributed.context_parallel(mesh).shard(torch.zeros(2, mesh.size() * 2 + 1))),
    }
    found = {}
    for name, (method, call) in calls.items():
        with tf.distributed.context_parallel(mesh, method=method):
            try:
                call()
                found[name] = "nothing"
            except (ValueError, NotImplementedError) as error:
                found[name] = str(error)
    return found


@pytest.fixture(scope="module", params=[2, 4], ids=lambda n: f"{n} processes")
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spread")
    mp.spawn(work, (request.param, str(folder / "rendezvous"), str(folder / "found.pt")), nprocs=request.param)
    return {"size": request.param, **torch.load(folder / "found.pt")}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("method", METHODS)
def test_as_one_process(found, method, case: Case):
    spread = found[method, case.name]
    if method in case.refused_by:
        assert 'method="ulysses"' in spread
        return
    assert not isinstance(spread, str), spread
    truth, plain = case.alone(torch.float64), case.alone(case.dtype)
    assert spread.keys() == truth.keys()
    for name, t in spread.items():
        assert_as_accurate(t, truth[name], plain[name], GRADIENT if name.startswith("d_") else OUTPUT, name)


@pytest.mark.parametrize("method", METHODS)
def test_memory_falls_with_the_processes(found, method):
    floats = 4 * 256 * 16 * 4 + 4 * 256  # query, key, value, out, and lse
    positions = 2 * 256 * 8 * 2 if method == "ulysses" else 0  # positions of the rows: two exchanges, int64
    assert found[method, "saved"] <= floats * 4 / found["size"] + positions


@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_of_each_process_and_the_same_in_backward(found, method):
    out, sums = found[method, "dropout"].values()
    assert not torch.equal(out[0], out[1])
    assert 0.9 < out[0].mean() < 1.1  # 2 * 4 * 128 * 128 draws with probability 3/4
    # The sum of d(sum of out)/dv is the sum of the kept weights, as is the sum of out for values of 1.
    torch.testing.assert_close(sums[0], sums[1])


def test_refusals_say_what_was_wanted(found):
    said, size = found["refusals"], found["size"]
    assert f"a multiple of the {size} processes" in said["heads"] and "got 3" in said["heads"]
    assert "two equal chunks" in said["odd"] and "got 5" in said["odd"]
    assert f"{8 * size}) with a column for every position, got (1, 1, 8, 8)" in said["mask"]
    for name in ("cache", "probabilities", "additive"):
        assert "context_parallel" in said[name], name
    assert f"{2 * size} divides" in said["length"] and f"got {2 * size + 1}" in said["length"]


@pytest.mark.quick
def test_bad_arguments():
    with pytest.raises(TypeError, match="mesh: wanted a torch.distributed DeviceMesh, got int"):
        tf.distributed.context_parallel(2)
