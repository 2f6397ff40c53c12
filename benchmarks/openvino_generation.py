"""Greedy generation by OpenVINO's CPU plugin: Hugging Face's decoders and encoder-decoders as stateful models.

The decoder's step is converted with its cache as inputs and outputs, which OpenVINO's own pass then turns into the
model's state, as in optimum-intel: keys and values stay inside the plugin, where attention is fused with them. The
encoder computes the keys and values of cross-attention once per call.
"""

import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from .case import Unavailable
from .checkpoints import folder
from .peers import quiet

__all__ = ["openvino_generation"]


def openvino_generation(inputs: Any, weights: str = "float32") -> Callable[[], torch.Tensor]:
    """The call that returns HF's tokens: (batch, prompt or start token and new tokens).

    inputs: generation_cases.Inputs with beams = 1, and without an encoder prompts of equal length.
    weights: "float32", or "int8" for 8-bit matrices with one scale per row, like NNCF's INT8_SYM, and activations that
    the plugin quantises at run time; everything else is float32.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(inputs.checkpoint)
    if not config.is_encoder_decoder and not bool(inputs.mask.all()):
        raise Unavailable("takes prompts of one length only")
    path = _converted(inputs, weights)
    decoder = _compile(path / "decoder.xml", weights)
    encoder = _compile(path / "encoder.xml", weights) if (path / "encoder.xml").exists() else None
    rows, ids, mask = len(inputs.ids), inputs.ids.numpy(), inputs.mask.numpy()
    order = np.arange(rows, dtype=np.int32)

    def call():
        fixed: dict[Any, Any] = {"beam_idx": order}
        prompt = ids
        if encoder is not None:
            encoder.infer({"input_ids": ids, "attention_mask": mask}, share_inputs=True, share_outputs=True)
            for port in encoder.model_outputs:
                decoder.set_tensor(port.any_name, encoder.get_tensor(port))
            fixed["attention_mask"] = mask
            prompt = np.full((rows, 1), config.decoder_start_token_id, dtype=np.int64)
        decoder.reset_state()
        tokens, found = prompt, [prompt]
        for _ in range(inputs.tokens):
            logits = decoder.infer({"input_ids": tokens, **fixed}, share_inputs=True, share_outputs=True)["logits"]
            logits[:, config.eos_token_id] = -np.inf  # min_new_tokens
            tokens = logits.argmax(-1)[:, None]
            found.append(tokens)
        if getattr(config, "forced_eos_token_id", None) is not None:
            found[-1] = np.full_like(tokens, config.forced_eos_token_id)
        return torch.from_numpy(np.concatenate(found, 1))

    return call


# ---- the step as a traceable module ------------------------------------------------------------------
def _cache(pairs: tuple[torch.Tensor, ...]) -> Any:
    """HF's cache with the keys and values of `pairs`, which alternate there."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for keys, values in zip(pairs[::2], pairs[1::2]):
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _bias(seen: torch.Tensor) -> torch.Tensor:
    """0 where `seen`, the least float32 elsewhere. HF uses a mask with four dimensions unchanged; its own mask code
    would not trace for other lengths."""
    return (1.0 - seen.to(torch.float32)) * torch.finfo(torch.float32).min


class _Step(nn.Module):
    """(input_ids (B, S), beam_idx (B,), [attention_mask (B, Sk), cross keys and values of each layer,] keys and values
    of each layer) -> logits of the last position (B, V), the cache with S more positions."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.crossed = bool(model.config.is_encoder_decoder)
        self.decoder = model.get_decoder() if self.crossed else model.base_model

    def forward(self, input_ids, beam_idx, *tensors):
        from transformers import EncoderDecoderCache

        options = {}
        if self.crossed:
            mask, tensors = tensors[0], tensors[1:]
            cross, tensors = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        cache = own = _cache(tuple(t.index_select(0, beam_idx) for t in tensors))
        past, length = tensors[0].shape[2], input_ids.shape[1]
        columns = torch.arange(past + length)
        causal = _bias(columns[None] <= columns[past:, None])[None, None]
        if self.crossed:
            cache = EncoderDecoderCache(own, _cache(cross))
            options = {"encoder_hidden_states": cross[0], "encoder_attention_mask": _bias(mask[:, None, None])}
        else:
            options = {"position_ids": columns[past:][None]}
        states = self.decoder(
            input_ids=input_ids, attention_mask=causal, past_key_values=cache, use_cache=True, **options
        ).last_hidden_state[:, -1]
        if self.model.config.model_type == "t5" and self.model.config.tie_word_embeddings:
            states = states * self.model.model_dim**-0.5
        logits = self.model.lm_head(states)
        if hasattr(self.model, "final_logits_bias"):
            logits = logits + self.model.final_logits_bias
        return logits, *(t for layer in own.layers for t in (layer.keys, layer.values))


class _Encoder(nn.Module):
    """(input_ids, attention_mask) -> the keys and values of each decoder layer's cross-attention, (B, H, Sk, D)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.encoder, decoder = model.get_encoder(), model.get_decoder()
        if model.config.model_type == "t5":
            found = [(block.layer[1].EncDecAttention.k, block.layer[1].EncDecAttention.v) for block in decoder.block]
        else:
            found = [(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj) for layer in decoder.layers]
        self.projections = nn.ModuleList(p for pair in found for p in pair)
        self.heads = _shape(model.config)[1]

    def forward(self, input_ids, attention_mask):
        states = self.encoder(
            input_ids=input_ids, attention_mask=_bias(attention_mask[:, None, None])
        ).last_hidden_state
        split = (states.shape[0], states.shape[1], self.heads, -1)
        return tuple(p(states).view(split).transpose(1, 2) for p in self.projections)


def _shape(config: Any) -> tuple[int, int, int]:
    """(layers, heads of keys and values, head size) of the decoder."""
    if config.model_type == "t5":
        return config.num_decoder_layers, config.num_heads, config.d_kv
    if config.model_type == "gpt2":
        return config.n_layer, config.n_head, config.n_embd // config.n_head
    if not config.is_encoder_decoder:
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_hidden_layers, config.num_key_value_heads, size
    heads = config.decoder_attention_heads
    return config.decoder_layers, heads, config.d_model // heads


# ---- conversion --------------------------------------------------------------------------------------
def _converted(inputs: Any, weights: str) -> pathlib.Path:
    """The folder of the converted models, which are converted if it does not exist."""
    path = folder() / f"{inputs.checkpoint.name}-openvino-{weights}"
    if not path.exists():
        import openvino

        graphs = _compressed(_converted(inputs, "float32")) if weights == "int8" else _graphs(inputs)
        partial = pathlib.Path(tempfile.mkdtemp(dir=folder()))
        for name, graph in graphs.items():
            openvino.save_model(graph, partial / f"{name}.xml", compress_to_fp16=False)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    return path


def _graphs(inputs: Any) -> dict[str, Any]:
    import transformers

    cls = getattr(transformers, inputs.kind)
    with quiet(), torch.no_grad():
        model = cls.from_pretrained(inputs.checkpoint, attn_implementation="sdpa").eval()
        graphs = {"decoder": _convert_step(model)}
        if model.config.is_encoder_decoder:
            graphs["encoder"] = _convert_encoder(model)
    return graphs


def _compressed(path: pathlib.Path) -> dict[str, Any]:
    import openvino

    graphs = {file.stem: openvino.Core().read_model(file) for file in path.glob("*.xml")}
    for graph in graphs.values():
        _compress(graph)
    return graphs


def _convert_encoder(model: nn.Module) -> Any:
    import openvino

    ids = torch.ones(2, 7, dtype=torch.int64)
    graph = openvino.convert_model(_Encoder(model), example_input=(ids, ids), input=[[-1, -1], [-1, -1]])
    for port, name in zip(graph.inputs, ("input_ids", "attention_mask"), strict=True):
        port.tensor.set_names({name})
    for port, name in zip(graph.outputs, _names("cross", model), strict=True):
        port.tensor.set_names({name})
    return graph


def _names(kind: str, model: nn.Module) -> list[str]:
    return [f"{kind}.{layer}.{what}" for layer in range(_shape(model.config)[0]) for what in ("key", "value")]


def _convert_step(model: nn.Module) -> Any:
    import openvino
    from openvino._offline_transformations import apply_make_stateful_transformation

    layers, heads, size = _shape(model.config)
    past, names = [torch.zeros(2, heads, 5, size)] * (2 * layers), ["input_ids", "beam_idx"]
    example = [torch.ones(2, 3, dtype=torch.int64), torch.arange(2, dtype=torch.int32)]
    if model.config.is_encoder_decoder:
        example += [torch.ones(2, 7, dtype=torch.int64)] + [torch.zeros(2, heads, 7, size)] * (2 * layers)
        names += ["attention_mask", *_names("cross", model)]
    names += _names("past", model)
    example += past
    dynamic = {4: [-1, heads, -1, size], 2: [-1, -1], 1: [-1]}
    graph = openvino.convert_model(
        _Step(model), example_input=tuple(example), input=[dynamic[t.dim()] for t in example]
    )
    for port, name in zip(graph.inputs, names, strict=True):
        port.tensor.set_names({name})
    for port, name in zip(graph.outputs, ["logits", *_names("present", model)], strict=True):
        port.tensor.set_names({name})
    states = dict(zip(_names("past", model), _names("present", model)))
    apply_make_stateful_transformation(graph, states)
    _start_empty(graph, heads, size)
    graph.validate_nodes_and_infer_types()
    return graph


def _start_empty(graph: Any, heads: int, size: int) -> None:
    """Give the reset state the batch size of input_ids and no positions."""
    from openvino import opset13 as ops

    ids = next(port for port in graph.inputs if "input_ids" in port.names)
    axis = ops.constant(0, dtype=np.int64)
    batch = ops.gather(ops.shape_of(ids, output_type="i64"), ops.constant([0], dtype=np.int64), axis)
    shape = ops.concat([batch, ops.constant([heads, 0, size], dtype=np.int64)], axis=0)
    empty = ops.broadcast(ops.constant(0.0, dtype=np.float32), shape)
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([empty.output(0)])


def _compress(graph: Any) -> None:
    """Make the constant weights of matrix products int8 with a float32 scale per output, a pattern that the plugin
    multiplies without decompression. Embeddings are not changed."""
    from openvino import Type
    from openvino import opset13 as ops

    for node in graph.get_ops():
        if node.get_type_name() != "MatMul":
            continue
        constant = node.input_value(1).get_node()
        if constant.get_type_name() != "Constant" or constant.get_element_type() != Type.f32:
            continue
        weight = constant.get_data()
        if not node.get_attributes()["transpose_b"]:
            weight = weight.T
        scale = np.abs(weight).max(1, keepdims=True) / 127
        rounded = np.rint(weight / np.maximum(scale, 1e-30)).astype(np.int8)
        unpacked = ops.multiply(ops.convert(ops.constant(rounded), "f32"), ops.constant(scale.astype(np.float32)))
        product = ops.matmul(node.input_value(0), unpacked, node.get_attributes()["transpose_a"], True)
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(product.output(0))
    graph.validate_nodes_and_infer_types()


def _compile(path: pathlib.Path, weights: str) -> Any:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        # Group size of quantised activations, with int8 weights; the plugin's default.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32" if weights == "int8" else "0",
    }
    return openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
