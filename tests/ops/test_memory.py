"""Output memory: large pages are requested only inside a tensor, and the tensor stays an ordinary one."""

import array
import copy
import ctypes
import mmap
import os
import pickle
import subprocess
import sys

import pytest
import torch
from numerics import GRADIENT, assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import memory
from transformer_fast.backends.contents import FileMappings, mirror_files

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("megabytes", [1, 2, 3, 9])
def test_advice_covers_whole_pages_inside_the_tensor(megabytes, monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "_madvise", lambda p, n, advice: asked.append((p, n, advice)))
    out = memory.empty((megabytes, 1 << 18), torch.float32, torch.device("cpu"))
    if megabytes < 2:
        assert not asked
        return
    for start, size, _ in asked:
        assert start % (2 << 20) == 0 and size % (2 << 20) == 0
        assert out.data_ptr() <= start and start + size <= out.data_ptr() + out.nbytes
    covered = sum(size for _, size, _ in asked)
    assert out.nbytes - covered < 4 << 20


def test_large_outputs_are_ordinary_tensors():
    y = tf.layer_norm(torch.randn(1024, 1024), 1024)
    expected = y.clone()
    assert torch.equal(pickle.loads(pickle.dumps(y)), expected)
    assert torch.equal(copy.deepcopy(y), expected)
    assert torch.equal(copy.copy(y).share_memory_(), expected)
    y = tf.layer_norm(torch.randn(1024, 1024), 1024)
    assert y.resize_(2048, 1024).shape == (2048, 1024)


def test_small_large_and_non_cpu_outputs_are_poisoned(monkeypatch):
    monkeypatch.setattr(memory, "_poison", True)
    assert memory.empty((3,), torch.float32, torch.device("cpu")).isnan().all()
    assert memory.empty((2, 1 << 20), torch.float32, torch.device("cpu")).isnan().all()
    assert memory.empty((3,), torch.float32, torch.device("meta")).shape == (3,)


def test_kept_memory_serves_the_next_loan():
    kept = memory.Kept(1 << 20)
    loan = memory.Loan(kept)
    t, u = loan.empty((100, 8), torch.float32), loan.empty((0,), torch.int32)
    assert t.shape == (100, 8) and t.dtype == torch.float32 and u.numel() == 0
    first = t.data_ptr()
    del loan
    again = memory.Loan(kept)
    larger, fits = again.empty((801,), torch.float32), again.empty((400, 3), torch.bfloat16)
    assert fits.data_ptr() == first != larger.data_ptr()
    assert memory.Loan(kept).empty((100, 8), torch.float32).data_ptr() != first  # lent already
    again.give(fits)
    one = memory.Loan(kept)
    assert one.empty((399,), torch.float32).data_ptr() != first  # a block is no more than twice what is asked for
    assert one.empty((400,), torch.float32).data_ptr() == first


def test_no_more_than_the_limit_is_kept():
    kept = memory.Kept(3000)
    loan = memory.Loan(kept)
    blocks = [loan.empty((size,), torch.uint8).data_ptr() for size in (1500, 1400, 1300, 5000)]
    del loan
    assert kept._blocks == []  # the last alone is more
    loan = memory.Loan(kept)
    blocks = [loan.empty((size,), torch.uint8).data_ptr() for size in (1500, 1400, 1300)]
    del loan
    assert [b.data_ptr() for b in kept._blocks] == blocks[1:]  # the longest unused has gone


def test_kept_memory_is_poisoned_again(monkeypatch):
    monkeypatch.setattr(memory, "_poison", True)
    kept = memory.Kept()
    for _ in range(2):
        loan = memory.Loan(kept)
        t = loan.empty((50,), torch.float32)
        assert t.isnan().all()
        t.fill_(1.0)
        del t, loan


def _pages_of_a_file(t: torch.Tensor) -> int:
    """The number of pages inside t that are resident pages of a file."""
    first, end = -(-t.data_ptr() // mmap.PAGESIZE), (t.data_ptr() + t.nbytes) // mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(8 * first)
        entries = array.array("Q", file.read(8 * (end - first)))
    return sum(bool(e >> 63 and e & 1 << 61) for e in entries)


@pytest.mark.skipif(not os.access("/proc/self/pagemap", os.R_OK), reason="the system has no /proc/self/pagemap")
@pytest.mark.parametrize("written", [None, 0, 3 << 19, (1 << 20) * 4 - 1])
def test_unload_gives_back_a_mapped_file_and_loses_nothing(tmp_path, written):
    values = torch.randn(1 << 20)
    path = tmp_path / "weights"
    path.write_bytes(values.numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=1 << 20, dtype=torch.float32)
    assert torch.equal(mapped, values)
    if written is not None:
        mapped[written // 4] = values[written // 4] = 7.0
    assert mirror_files([mapped]) == (written is None)
    before = _pages_of_a_file(mapped)
    memory.unload(mapped, FileMappings())
    after = _pages_of_a_file(mapped)
    assert before > 100 and (after == 0) == (written is None)  # the system may drop some if memory is short
    assert torch.equal(mapped, values)


@pytest.mark.skipif(not os.access("/proc/self/pagemap", os.R_OK), reason="the system has no /proc/self/pagemap")
def test_quantising_gives_back_the_pages_of_a_mapped_weight(tmp_path):
    values = torch.randn(1024, 1024)
    path = tmp_path / "weights"
    path.write_bytes(values.numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=1 << 20, dtype=torch.float32).view(1024, 1024)
    assert torch.equal(mapped, values)
    linear = torch.nn.Linear(1024, 1024, bias=False)
    linear.weight = torch.nn.Parameter(mapped, requires_grad=False)
    assert _pages_of_a_file(mapped) > 100
    model = tf.quantize(torch.nn.Sequential(linear))
    assert _pages_of_a_file(mapped) == 0
    assert (model[0].dequantized() - values).abs().max() < values.abs().max() / 127
    assert torch.equal(mapped, values)


def test_unload_keeps_memory_of_its_own():
    t = torch.randn(1 << 20)
    expected = t.clone()
    assert not mirror_files([t])
    memory.unload(t, FileMappings())
    memory.unload(t[:3], FileMappings())
    memory.unload(t.view(1024, 1024).t(), FileMappings())
    memory.unload(t.to("meta"), FileMappings())
    assert torch.equal(t, expected)


@pytest.mark.skipif(not os.access("/proc/self/pagemap", os.R_OK), reason="the system has no /proc/self/pagemap")
def test_what_is_written_while_pages_are_given_back_is_kept(tmp_path, monkeypatch):
    """Another thread writes between the check and the release of the pages, and right after."""
    values = torch.randn(1 << 14)
    path = tmp_path / "weights"
    path.write_bytes(values.numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=1 << 14, dtype=torch.float32)
    move = memory._mremap

    def write_around(*args):
        mapped[2000:2100] = values[2000:2100] = 7.0
        moved = move(*args)
        mapped[2100:2200] = values[2100:2200] = 8.0
        return moved

    monkeypatch.setattr(memory, "_mremap", write_around)
    memory.unload(mapped, FileMappings())
    assert torch.equal(mapped, values)


_KEEPING = """
import resource, sys
import torch
import transformer_fast as tf
from transformer_fast.backends import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(6 << 20) for _ in range(6)]  # 24 MB each
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

config = tf.BertConfig(vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
model, ids = tf.BertModel(config), torch.randint(30, (2, 5))
with torch.no_grad():
    model(ids)
assert memory._keeps is None
model(ids)
print(memory._keeps, [faults() for _ in range(4)][-1])
"""


@pytest.mark.skipif(not hasattr(memory._libc, "gnu_get_libc_version"), reason="another libc than glibc")
def test_memory_of_a_training_step_is_kept():
    """And not that of inference, nor against the user's will."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}

    def run(**environment):
        out = subprocess.run(
            [sys.executable, "-c", _KEEPING], env=plain | environment, capture_output=True, text=True, timeout=600
        )
        assert out.returncode == 0, out.stderr
        keeps, faults = out.stdout.split()
        return keeps, int(faults)

    assert run(TRANSFORMER_FAST_KEEP_MEMORY="0")[0] == "False"
    assert run(MALLOC_ARENA_MAX="4")[0] == "False"
    keeps, faults = run()
    assert keeps == "True" and faults < 1000  # 144 MB are 36,000 pages


def test_large_gradients_take_the_memory_of_the_last_ones(monkeypatch):
    """As soon as nobody refers to it, however indirectly."""
    monkeypatch.setattr(memory, "_keeps", True)
    weight = torch.nn.Parameter(torch.zeros(1 << 15, 300))  # 37.5 MB
    first = memory.empty_gradient(weight, weight.shape, torch.float32)
    assert first.shape == weight.shape and first.is_contiguous()
    place, view = first.data_ptr(), first[3].numpy()
    del first
    second = memory.empty_gradient(weight, weight.shape, torch.float32)
    other = memory.empty_gradient(weight, (300, 1 << 15), torch.float32)
    assert len({place, second.data_ptr(), other.data_ptr()}) == 3
    view[:] = 1.0
    again = second.data_ptr()
    del second, view
    third = memory.empty_gradient(weight, (1 << 14, 600), torch.float32)
    assert third.data_ptr() == again and third.shape == (1 << 14, 600) and third.is_contiguous()
    small = torch.nn.Parameter(torch.zeros(8))
    memory.empty_gradient(small, small.shape, torch.float32)
    assert weight in memory._gradients and small not in memory._gradients
    assert memory.empty_gradient(None, weight.shape, torch.bfloat16).dtype == torch.bfloat16
    kept = len(memory._gradients)
    del weight
    assert len(memory._gradients) < kept
    monkeypatch.setattr(memory, "_keeps", None)
    unkept = torch.nn.Parameter(torch.zeros(1 << 15, 300))
    memory.empty_gradient(unkept, unkept.shape, torch.float32)
    assert unkept not in memory._gradients


def test_training_with_a_large_vocabulary(monkeypatch):
    """Steps whose gradients are freed, kept or accumulated have the gradients of a fresh model."""
    monkeypatch.setattr(memory, "_LARGEST", 1 << 10)
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model, batches = tf.BertForMaskedLM(config).eval(), torch.randint(300, (5, 2, 7))

    def gradients(ids):
        grads = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()), allow_unused=True)
        return [None if g is None else g.clone() for g in grads]

    monkeypatch.setattr(memory, "_keeps", False)
    wanted = [gradients(ids) for ids in batches]
    monkeypatch.setattr(memory, "_keeps", True)
    for ids, want in zip(batches, wanted):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients(ids), want))
    assert len(memory._gradients)
    held = []
    for ids in batches:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        held.append(model.bert.embeddings.word_embeddings.weight.grad)
    place = [p is model.bert.embeddings.word_embeddings.weight for p in model.parameters()].index(True)
    assert all(torch.equal(grad, want[place]) for grad, want in zip(held, wanted))
    for ids in batches:
        model(ids, labels=ids).loss.backward()
    parts = [wanted[-1][place], *(want[place] for want in wanted)]  # the last step's gradient is there already
    truth, plain = sum(part.double() for part in parts), sum(parts)
    assert_as_accurate(model.bert.embeddings.word_embeddings.weight.grad, truth, plain, GRADIENT)


@pytest.mark.quick
@pytest.mark.parametrize(
    "size, stride", [((0, 5), (2, 2)), ((3, 0), (4, 3)), ((3, 4), (1, 3)), ((2, 3), (0, 2)), ((3, 4), (8, 1))]
)
def test_unit_stride(size, stride):
    """Of empty tensors too, which count as contiguous with any strides."""
    t = torch.arange(64.0).as_strided(size, stride)
    found = memory.unit_stride(t)
    assert torch.equal(found, t) and (found.stride(-1) == 1 or size[-1] <= 1)
    assert (found is t) == (stride[-1] == 1 or size[-1] <= 1)
    weight = torch.arange(64.0).as_strided((5, 1), (1, 7))
    assert memory.unit_stride_weight(weight).stride(-1) == 1


@pytest.mark.quick
def test_what_was_written_before_and_after_pages_were_moved(tmp_path):
    """The later write wins, whichever bytes the two wrote."""
    size = 2 * mmap.PAGESIZE
    (tmp_path / "weights").write_bytes(b"f" * size)
    with open(tmp_path / "weights", "r+b") as file:
        here, moved = (mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) for _ in range(2))
    moved[10:30] = b"1" * 20
    here[20:40] = b"2" * 20
    begins = [ctypes.addressof(ctypes.c_char.from_buffer(m)) for m in (here, moved)]
    memory._put_back(*begins, size)
    assert here[:50] == b"f" * 10 + b"1" * 10 + b"2" * 20 + b"f" * 10 and here[50:] == b"f" * (size - 50)
