"""Reads ELMo's published files, options.json and weights.hdf5, as written by bilm-tf and read by AllenNLP."""

import json
import os
from typing import Any

import torch

__all__ = ["read_options", "read_weights"]


def read_options(file: str | os.PathLike) -> dict[str, Any]:
    """The arguments of ElmoConfig from options.json. ValueError, naming the file, for a missing or mistyped entry."""
    try:
        with open(file, encoding="utf-8") as handle:
            options = json.load(handle)
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{file}: is not valid JSON ({error})") from error

    def find(path: str, kind: Any, default: Any = ...) -> Any:
        found = options
        for name in path.split("."):
            found = found.get(name, ...) if isinstance(found, dict) else ...
        found = default if found is ... else found
        if found is ...:
            raise ValueError(f"{file}: wanted {path}, which is not there")
        if found is not default and (not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool)):
            raise ValueError(f"{file}: {path}: wanted {_name(kind)}, got {found!r}")
        return found

    filters = find("char_cnn.filters", list)
    if not filters or any(
        not isinstance(pair, list) or len(pair) != 2 or any(type(n) is not int or n < 1 for n in pair)
        for pair in filters
    ):
        raise ValueError(f"{file}: char_cnn.filters: wanted a list of [width, number], got {filters!r}")
    clips = {"cell_clip": find("lstm.cell_clip", (int, float), None),
             "projection_clip": find("lstm.proj_clip", (int, float), None)}  # fmt: skip
    return {
        "char_embedding_size": find("char_cnn.embedding.dim", int),
        "char_activation": find("char_cnn.activation", str),
        "num_highway_layers": find("char_cnn.n_highway", int, 0),
        "num_characters": find("char_cnn.n_characters", int),
        "max_characters_per_token": find("char_cnn.max_characters_per_token", int, 50),
        "filters": filters,
        "cell_size": find("lstm.dim", int),
        "projection_size": find("lstm.projection_dim", int),
        "num_layers": find("lstm.n_layers", int),
        "use_skip_connections": find("lstm.use_skip_connections", bool, False),
        **{name: clip or None for name, clip in clips.items()},  # 0 does not clip
    }


def _name(kind: Any) -> str:
    names = {int: "an integer", str: "a string", list: "a list", bool: "true or false", (int, float): "a number"}
    return names[kind]


def read_weights(file: str | os.PathLike, config) -> dict[str, torch.Tensor]:
    """The state dict of ElmoModel(config) from weights.hdf5.

    bilm-tf's matrices are (in, out), with gates in the order i, g, f, o and 1 added to f when they are used. The first
    row of its character embeddings, for padding, is not stored. Its carry gate has the same sign as ours.
    ImportError without h5py; ValueError, naming file and dataset, for another layout or shapes than the options give.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{file}: needs h5py, not installed here: pip install h5py") from error
    try:
        handle = h5py.File(file, "r")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{file}: is not an HDF5 file, or is truncated ({error})") from error
    with handle:
        return _Reader(file, handle).read(config)


class _Reader:
    def __init__(self, file, handle):
        self.file, self.found, self.taken = file, {}, set()
        handle.visititems(lambda name, item: self.found.update({name: item} if hasattr(item, "shape") else {}))

    def take(self, name: str, *shape: int) -> torch.Tensor:
        if name not in self.found:
            near = sorted(n for n in self.found if n not in self.taken)
            raise ValueError(
                f"{self.file}: wanted a dataset {name} of shape {shape}, which is not there; the file has "
                f"{', '.join(near[:4]) or 'no unused ones'}"
            )
        dataset = self.found[name]
        if tuple(dataset.shape) != shape:
            hint = "; n_characters counts one more than the rows stored: 262 for bytes" if name == "char_embed" else ""
            raise ValueError(
                f"{self.file}: {name}: wanted shape {shape} by the options, got {tuple(dataset.shape)}{hint}"
            )
        if dataset.dtype.kind != "f":
            raise ValueError(f"{self.file}: {name}: wanted floating-point numbers, got {dataset.dtype}")
        self.taken.add(name)
        return torch.from_numpy(dataset[...].astype("float32"))

    def read(self, config) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = {}
        prefix, width = "embeddings.", config.char_embedding_size
        characters = self.take("char_embed", config.num_characters - 1, width)
        state[f"{prefix}characters.weight"] = torch.cat((torch.zeros(1, width), characters))
        for i, (span, number) in enumerate(config.filters):
            kernel = self.take(f"CNN/W_cnn_{i}", 1, span, width, number)
            state[f"{prefix}convolutions.{i}.weight"] = kernel[0].permute(2, 1, 0).contiguous()
            state[f"{prefix}convolutions.{i}.bias"] = self.take(f"CNN/b_cnn_{i}", number)
        total = sum(number for _, number in config.filters)
        for i in range(config.num_highway_layers):
            for name in ("carry", "transform"):
                matrix = self.take(f"CNN_high_{i}/W_{name}", total, total)
                state[f"{prefix}highways.{i}.{name}.weight"] = matrix.t().contiguous()
                state[f"{prefix}highways.{i}.{name}.bias"] = self.take(f"CNN_high_{i}/b_{name}", total)
        size, cell = config.projection_size, config.cell_size
        state[f"{prefix}projection.weight"] = self.take("CNN_proj/W_proj", total, size).t().contiguous()
        state[f"{prefix}projection.bias"] = self.take("CNN_proj/b_proj", size)
        for direction, name in enumerate(("forward_lstm", "backward_lstm")):
            for i in range(config.num_layers):
                group, ours = f"RNN_{direction}/RNN/MultiRNNCell/Cell{i}/LSTMCell", f"layers.{i}.{name}"
                matrix = _torch_gates(self.take(f"{group}/W_0", 2 * size, 4 * cell).t())
                bias = _torch_gates(self.take(f"{group}/B", 4 * cell))
                bias[cell : 2 * cell] += 1.0
                state[f"{ours}.weight_ih"], state[f"{ours}.weight_hh"] = (t.contiguous() for t in matrix.split(size, 1))
                state[f"{ours}.bias"] = bias
                state[f"{ours}.weight_hr"] = self.take(f"{group}/W_P_0", cell, size).t().contiguous()
        left = sorted(n for n in self.found.keys() - self.taken if n.startswith(("CNN", "RNN_", "char_embed")))
        if left:
            raise ValueError(
                f"{self.file}: holds {len(left)} datasets that the options do not ask for: {', '.join(left[:3])}"
            )
        return state


def _torch_gates(t: torch.Tensor) -> torch.Tensor:
    """Reorder the gates i, g, f, o -> i, f, g, o along the first dimension."""
    i, g, f, o = t.chunk(4)
    return torch.cat((i, f, g, o))
