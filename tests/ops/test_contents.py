"""Detection of changed tensors: hashes of memory, pages of mapped files, and both together."""

import mmap
import os

import pytest
import torch

import transformer_fast as tf
from transformer_fast.backends import contents, memory, native
from transformer_fast.backends.contents import Contents, FileMappings, mirror_files, unwritten

if native.load():
    pytest.skip(native.load(), allow_module_level=True)

pytestmark = pytest.mark.quick
needs_pagemap = pytest.mark.skipif(
    not os.access("/proc/self/pagemap", os.R_OK), reason="the system has no /proc/self/pagemap"
)


def hash_of(*tensors):
    return contents._hashes(tensors)


@pytest.fixture
def no_hash(monkeypatch):
    """Call the result to make any further hashing fail the test."""
    return lambda: monkeypatch.setattr(contents, "_hashes", lambda tensors: pytest.fail("hashed"))


def mapped(path, values):
    """A float32 tensor in a private mapping of a file with these values, which was not written just now."""
    path.write_bytes(values.numpy().tobytes())
    os.utime(path, (1e9, 1e9))
    return torch.from_file(str(path), shared=False, size=values.numel(), dtype=torch.float32)


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Treat new files as old ones, except in the test about that."""
    monkeypatch.setattr(contents, "_STILL", -(10**12))


# ---- the hash ------------------------------------------------------------------------------------
@pytest.mark.parametrize("isa", native.supported_isas())
def test_every_bit_and_every_length_counts(isa):
    whole = torch.randint(0, 256, (4200,), dtype=torch.uint8)
    before = native.current_isa()
    native.set_isa(isa)
    try:
        for begin in (0, 1, 7, 13):
            prefixes = [whole[begin : begin + n] for n in range(4098)]
            assert len(set(hash_of(*prefixes))) == 4098
            assert len(set(hash_of(*(torch.zeros(n, dtype=torch.uint8) for n in range(4098))))) == 4098
        for size in (1, 8, 255, 256, 257, 1500):
            data = whole[3 : 3 + size]
            (original,) = hash_of(data)
            flipped = {original}
            for bit in range(8 * size):
                data[bit // 8] ^= 1 << bit % 8
                flipped.add(hash_of(data)[0])
                data[bit // 8] ^= 1 << bit % 8
            assert len(flipped) == 8 * size + 1 and hash_of(data) == [original]
        words = torch.randint(-(2**63), 2**63 - 1, (64,))
        flips = [(at, 1 << bit if bit < 63 else -(2**63)) for at in (0, 32) for bit in range(64)]  # one lane
        pairs = []
        for at, bit in flips:
            many = words.repeat(128, 1)
            many[:, at] ^= bit
            for row, (other, second) in zip(many, flips):
                row[other] ^= second
            pairs += list(many)
        assert len(set(hash_of(*pairs))) == 1 + 128 * 127 // 2
    finally:
        native.set_isa(before)


def test_changes_that_undo_each_other_count():
    """Two changed signs, swapped numbers, swapped blocks, and many such changes at once."""
    t = torch.randn(3 << 18)  # 3 blocks
    (original,) = hash_of(t)
    seen = {original, *hash_of(-t, t.flip(0), t.view(3, -1).flip(0).contiguous(), t.roll(1), t.roll(64), t.abs())}
    assert len(seen) == 7
    for distance in (1, 2, 16, 32, 64, 128, 1 << 18):
        negated, swapped = t.clone(), t.clone()
        negated[[5, 5 + distance]] *= -1
        swapped[[5, 5 + distance]] = t[[5 + distance, 5]]
        seen |= set(hash_of(negated, swapped))
    assert len(seen) == 7 + 14
    doubles = torch.randn(1000, dtype=torch.float64)
    pairs = [doubles.clone() for _ in range(1, 200)]
    for i, pair in enumerate(pairs):
        pair[[0, i + 1]] *= -1
    assert len(set(hash_of(doubles, *pairs))) == 200


def test_large_memory_in_many_tensors_and_threads():
    tensors = [torch.randn(n) for n in (0, 1, 300_000, 5, 1 << 18, 0, (1 << 19) + 3)]
    together = hash_of(*tensors)
    assert together == [hash_of(t)[0] for t in tensors]
    tensors[-1][-1] += 1
    assert [a == b for a, b in zip(hash_of(*tensors), together)] == [True] * 6 + [False]


# ---- contents ------------------------------------------------------------------------------------
def noted(*tensors):
    held = Contents()
    held.note(tensors, FileMappings())
    return held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gaps", "expanded"])
def test_a_change_anywhere_shows(dtype, layout):
    base = (100 * torch.randn(40, 30)).to(dtype)
    t = {"contiguous": base, "transposed": base.t(), "gaps": base[::2, 3:9], "expanded": base[:1].expand(4, 30)}[layout]
    held = noted(t)
    assert held.same([t]) and held.same([t.clone()]) == (layout in ("contiguous", "transposed"))
    base[0, 3] += 1
    assert not held.same([t])
    base[0, 3] -= 1
    assert held.same([t])
    base[1, 0] += 1
    assert held.same([t]) == (layout in ("gaps", "expanded"))


def test_other_shapes_numbers_and_devices_are_others():
    t = torch.randn(6, 4)
    held = noted(t, t[0])
    assert held.same([t, t[0]]) and held.same([torch.nn.Parameter(t), t[0]])
    for others in ([t], [t, t[1]], [t.view(4, 6), t[0]], [t.view(torch.int32), t[0]], [t.to("meta"), t[0]]):
        assert not held.same(others)


@needs_pagemap
def test_an_unwritten_file_is_known_by_its_pages(tmp_path, no_hash):
    values = torch.randn(1 << 18)
    whole = mapped(tmp_path / "weights", values)
    parts = [whole[: 1 << 17].view(512, 256), whole[1 << 17 : (1 << 17) + 3], whole[(1 << 17) + 3 :].view(-1, 1)]
    held = noted(*parts)
    assert mirror_files(parts)
    no_hash()
    assert held.same(parts)
    for part in parts:
        memory.unload(part, FileMappings())
    assert held.same(parts)


@needs_pagemap
@pytest.mark.parametrize("at", [0, 5, (1 << 17) - 1])
def test_what_is_written_to_a_mapped_file_shows(tmp_path, at):
    """Writes to a whole page, and to a page that two tensors share. Writing the old value back is no change."""
    whole = mapped(tmp_path / "weights", torch.randn(1 << 17))
    parts = [whole[:3], whole[3:]]
    held = noted(*parts)
    kept = whole[at].clone()
    whole[at] = 7.0
    assert unwritten(parts) == [at == (1 << 17) - 1, at == 0 and False]
    assert not held.same(parts) and not mirror_files(parts)
    whole[at] = kept
    assert held.same(parts) and held.same(parts)


@needs_pagemap
def test_another_file_or_a_file_that_was_rewritten_shows(tmp_path):
    values = torch.randn(1 << 14)
    t = mapped(tmp_path / "weights", values)
    held = noted(t)
    other = mapped(tmp_path / "other", values)
    assert held.same([other]) and held.same([t])
    os.utime(tmp_path / "weights", (2e9, 2e9))
    assert held.same([t])
    with open(tmp_path / "weights", "r+b") as file:  # an unwritten mapping shows the new content
        file.write((values + 1).numpy().tobytes())
    assert not held.same([t])
    os.remove(tmp_path / "other")
    assert held.same([other])
    other[0] += 1
    assert not held.same([other])


@needs_pagemap
def test_a_file_that_was_just_written_is_not_believed_by_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "_STILL", 10**12)
    t = mapped(tmp_path / "weights", torch.randn(1 << 14))
    asked = []
    hashes = contents._hashes
    monkeypatch.setattr(contents, "_hashes", lambda tensors: (asked.append(len(tensors)), hashes(tensors))[1])
    held = noted(t)
    assert held.same([t]) and held.same([t]) and asked == [1, 1, 1]
    monkeypatch.setattr(contents, "_STILL", -(10**12))
    assert held.same([t]) and held.same([t]) and asked == [1, 1, 1, 1]


def test_shared_mappings_are_no_private_ones(tmp_path):
    """Pages of a shared mapping stay file pages after a write."""
    path = tmp_path / "shared"
    path.write_bytes(bytes(1 << 16))
    os.utime(path, (1e9, 1e9))
    for t in (torch.from_file(str(path), shared=True, size=1 << 14), torch.zeros(1 << 14).share_memory_()):
        held = noted(t)
        assert not mirror_files([t]) and held.same([t])
        t[77] = 1
        assert not held.same([t])


def test_fresh_memory_is_no_file():
    with mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as untouched:
        t = torch.frombuffer(untouched, dtype=torch.float32)
        assert not mirror_files([t]) and FileMappings().find(t) is None
        del t


def test_without_proc_everything_is_hashed(monkeypatch, tmp_path):
    t = mapped(tmp_path / "weights", torch.randn(1 << 14))

    def refuse(*args, **kwargs):
        raise PermissionError

    for name in ("open", "os"):
        with monkeypatch.context() as patch:
            if name == "open":
                patch.setattr("builtins.open", refuse)
            else:
                patch.setattr(os, "open", refuse)
            held = noted(t)
            assert not mirror_files([t]) and held.same([t])
            t[1] += 1
            assert not held.same([t])
            t[1] -= 1


# ---- weights in panels ------------------------------------------------------------------------------
@pytest.mark.parametrize("forced", [None, "eager"])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_panels_match_what_would_be_laid_out_alike(storage, forced):
    weight = torch.nn.Parameter(torch.randn(40, 24))
    with tf.backend(forced) if forced else torch.no_grad():
        panels = tf.to_panels(weight, storage)
        assert panels.matches(weight) and panels.matches(weight.detach().clone())
        for write in (
            lambda: weight.data[3].mul_(2), lambda: weight.detach().numpy().__imul__(-1),
            lambda: torch._fused_sgd_([weight], [torch.ones(40, 24)], [], weight_decay=0.0, momentum=0.0, lr=9.0,
                                      dampening=0.0, nesterov=False, maximize=False, is_first_step=False),
        ):  # fmt: skip
            before = weight.detach().clone()
            with torch.no_grad():
                write()
            assert not panels.matches(weight) and panels.matches(before)
            panels = tf.to_panels(weight, storage)
            assert panels.matches(weight)
        assert not panels.matches(weight[:39]) and not panels.matches(weight.to("meta"))
