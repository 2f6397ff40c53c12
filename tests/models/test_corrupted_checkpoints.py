"""Randomly corrupted checkpoints: each raises an error that names its file, or loads the values in the file. None
crashes, hangs or runs code."""

import json
import pathlib
import random
import shutil
import struct

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import transformer_fast as tf

DRAWS = 100


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=24, max_position_embeddings=12)
    model = transformers.BertModel(config)
    for name, more in (("one", {}), ("shards", {"max_shard_size": "8KB"})):
        model.save_pretrained(folder / name, **more)
    shutil.copytree(folder / "one", folder / "pickle")
    (folder / "pickle" / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pickle" / "pytorch_model.bin")
    return folder


def _weights(folder: pathlib.Path, rng: random.Random) -> pathlib.Path:
    return rng.choice(sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]))


def truncate(folder, rng):
    file = _weights(folder, rng)
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def flip_bits(folder, rng):
    file = _weights(folder, rng)
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 8))):
        data[rng.randrange(min(len(data), rng.choice((200, 3000, len(data)))))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def _one_tensor(folder, rng, change):
    file = _weights(folder, rng)
    if file.suffix == ".bin":
        tensors = torch.load(file)
    else:
        tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    tensors[name] = change(tensors[name])
    if tensors[name] is None:
        del tensors[name]
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_file(tensors, file, {"format": "pt"})


def wrong_shape(folder, rng):
    _one_tensor(folder, rng, rng.choice((
        lambda t: t[:-1].clone(), lambda t: t[None].clone(), lambda t: t[..., :0].clone(),
        lambda t: t.flatten()[:1].clone(), lambda t: torch.cat([t, t]),
    )))  # fmt: skip


def wrong_dtype(folder, rng):
    dtype = rng.choice((torch.int64, torch.bool, torch.float64, torch.float16, torch.uint8))
    _one_tensor(folder, rng, lambda t: t.to(dtype))


def missing_tensor(folder, rng):
    _one_tensor(folder, rng, lambda t: None)


def missing_file(folder, rng):
    rng.choice(sorted(folder.iterdir())).unlink()


def header_lies(folder, rng):
    file = _weights(folder, rng)
    data = file.read_bytes()
    if file.suffix == ".bin":
        return truncate(folder, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = sorted(set(header) - {"__metadata__"})
    entry = header[rng.choice(names)]
    kind = rng.choice(("offsets", "shape", "dtype", "length", "type", "other's bytes", "huge"))
    if kind == "offsets":
        entry["data_offsets"][rng.randrange(2)] += rng.choice((-4, 4, 10**12, -(10**12)))
    elif kind == "shape":
        entry["shape"] = rng.choice(([2**62, 2**62], [-1], [], ["x"], None))
    elif kind == "dtype":
        entry["dtype"] = rng.choice(("F64", "I8", "Q7", None, 3))
    elif kind == "type":
        entry.clear()
    elif kind == "other's bytes":
        entry["data_offsets"] = header[rng.choice(names)]["data_offsets"]
    elif kind == "huge":
        entry["shape"] = [1] * 10000
    text = json.dumps(header).encode()
    size = rng.choice((0, 2**63, length * 2, length - 1)) if kind == "length" else len(text)
    file.write_bytes(struct.pack("<Q", size) + text + body)


def configuration(folder, rng):
    file = folder / "config.json"
    text = file.read_text()
    if rng.random() < 0.4:
        file.write_text(text[: rng.randrange(len(text))])
        return
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "hidden_act", "model_type")
    key = rng.choice(keys)
    file.write_text(json.dumps(json.loads(text) | {key: rng.choice((None, "x", -1, 0, 7, 2**40, [1], 2.5))}))


def index(folder, rng):
    file = folder / "model.safetensors.index.json"
    if not file.exists():
        return truncate(folder, rng)
    text = file.read_text()
    if rng.random() < 0.5:
        file.write_text(text[: rng.randrange(len(text))])
        return
    content = json.loads(text)
    names = content["weight_map"]
    names[rng.choice(sorted(names))] = rng.choice(("nowhere.safetensors", "../../etc/passwd", None, 3, *names.values()))
    file.write_text(json.dumps(content))


class Canary:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return pathlib.Path.write_text, (self.file, "code was run")


def code(folder, rng):
    """A pickle that runs code when it is loaded."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    tensors = {"embeddings.word_embeddings.weight": torch.randn(20, 16), "x": Canary(folder / "canary")}
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=rng.random() < 0.5)


KINDS = (
    truncate, flip_bits, flip_bits, wrong_shape, wrong_dtype, missing_tensor, missing_file, header_lies, header_lies,
    configuration, index, code,
)  # fmt: skip


def _as_the_file_says(model, folder) -> bool:
    files = sorted(folder.glob("*.safetensors"))
    said = {}
    for file in files or folder.glob("*.bin"):
        said |= load_file(file) if files else torch.load(file)
    own = model.state_dict()
    return all(
        torch.equal(own[k].nan_to_num(7.0), t.to(own[k].dtype).nan_to_num(7.0)) for k, t in said.items() if k in own
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(4))
def test_corrupted_checkpoints(whole, tmp_path, part):
    wrong = []
    for draw in range(part, DRAWS, 4):
        rng = random.Random(draw)
        kind = rng.choice(KINDS)
        source = rng.choice(("one", "one", "shards", "pickle"))
        folder = tmp_path / f"draw{draw}"
        shutil.copytree(whole / source, folder)
        kind(folder, rng)
        where = f"draw {draw}, {kind.__name__} of {source}"
        try:
            model = tf.BertModel.from_pretrained(folder)
        except Exception as error:
            named = str(folder) in str(error) or any(p.name in str(error) for p in (whole / source).iterdir())
            if not named or not isinstance(error, (ValueError, OSError, TypeError)):
                wrong.append(f"{where}: {type(error).__module__}.{type(error).__name__}: {str(error)[:150]}")
        else:
            if not _as_the_file_says(model, folder):
                wrong.append(f"{where}: loaded other weights than the file's")
        assert not (folder / "canary").exists(), f"{where}: code was run"
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
