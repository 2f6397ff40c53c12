"""Other ways to run a Hugging Face BERT encoder on the CPU: ONNX Runtime, OpenVINO, CTranslate2, torch.compile.

Each function takes an EncoderInputs and returns the call to time. All use the same padded batches, torch's thread
count, float32 (unless the name says int8) and the settings that their documentation recommends for latency.
"""

import inspect
import logging
import pathlib
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from .case import Unavailable
from .checkpoints import folder

__all__ = [
    "EncoderInputs",
    "compiled",
    "ctranslate2_encoder",
    "hugging_face",
    "onnxruntime_encoder",
    "openvino_encoder",
    "openvino_forward",
    "quiet",
]


class EncoderInputs(NamedTuple):
    """checkpoint: a folder. batches: (input_ids, attention_mask), int64, padded on the right to the longest. dtype: of
    the model. family: the prefix of its class names."""

    checkpoint: pathlib.Path
    batches: list[tuple[torch.Tensor, torch.Tensor]]
    dtype: torch.dtype = torch.float32
    family: str = "Bert"

    @property
    def device(self) -> torch.device:
        return self.batches[0][0].device

    def load(self, module: Any, **options: Any) -> Any:
        """The family's base model of `module` (transformers, transformer_fast), without a pooler."""
        import transformers

        if self.family == "MPNet" and options.pop("attn_implementation", "sdpa") not in ("sdpa", "eager"):
            raise Unavailable("transformers' MPNet has no attention interface")
        if "add_pooling_layer" in inspect.signature(getattr(transformers, f"{self.family}Model").__init__).parameters:
            options["add_pooling_layer"] = False
        model = getattr(module, f"{self.family}Model").from_pretrained(self.checkpoint, **options).eval()
        return model.to(self.device, self.dtype)


def gather(hidden: list[torch.Tensor], inputs: EncoderInputs) -> torch.Tensor:
    """The last hidden states of the real tokens (tokens, width), which must be equal for all candidates."""
    return torch.cat([h[mask.bool()] for h, (_, mask) in zip(hidden, inputs.batches)])


def run_batches(forward: Callable, inputs: EncoderInputs) -> Callable:
    def call():
        with torch.inference_mode():
            return [forward(ids, mask) for ids, mask in inputs.batches]

    return call


def hugging_face(inputs: EncoderInputs, attention: str = "sdpa", change: Callable | None = None) -> Callable:
    """transformers' model; `change` may transform it (accelerate, compile)."""
    import transformers

    model = inputs.load(transformers, attn_implementation=attention)
    if change is not None:
        model = change(model)
    return run_batches(lambda ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state, inputs)


def compiled(inputs: EncoderInputs, freezing: bool = False) -> Callable:
    """torch.compile of the sdpa model; freezing makes the weights constants that inductor may pack."""
    from torch._inductor import config

    lengths = {ids.shape for ids, _ in inputs.batches}
    # Dynamo reads the global setting when it first sees a shape, so every shape is run inside the patch.
    with config.patch(freezing=freezing):
        call = hugging_face(inputs, change=lambda m: torch.compile(m, dynamic=len(lengths) > 1))
        call()
    return call


@contextmanager
def quiet():
    """Silence the converters' warnings, which would disturb the progress bar."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


class _Traceable(torch.nn.Module):
    """(input_ids, attention_mask) -> last hidden state, with HF's eager attention, which exporters support."""

    def __init__(self, checkpoint: pathlib.Path, attention: str):
        super().__init__()
        from transformers import BertModel

        self.model = BertModel.from_pretrained(checkpoint, attn_implementation=attention, add_pooling_layer=False)
        self.eval()

    def forward(self, input_ids, attention_mask):
        # A 4-D additive mask: transformers' own mask code does not trace for other lengths.
        bias = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * torch.finfo(torch.float32).min
        return self.model(
            input_ids=input_ids,
            attention_mask=bias,
            token_type_ids=torch.zeros_like(input_ids),
            position_ids=torch.arange(input_ids.shape[1]).unsqueeze(0),
        ).last_hidden_state


def _example() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(2, 16, dtype=torch.int64), torch.ones(2, 16, dtype=torch.int64)


def onnxruntime_encoder(inputs: EncoderInputs, int8: bool = False) -> Callable:
    """ONNX Runtime with the graph fusions of onnxruntime.transformers. int8: after its dynamic quantisation."""
    import onnxruntime

    path = folder() / f"{inputs.checkpoint.name}.onnx"
    if not path.exists():
        _export_onnx(inputs.checkpoint, path)
    if int8:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        whole, path = path, path.with_suffix(".int8.onnx")
        if not path.exists():
            with quiet():
                quantize_dynamic(
                    whole, path, weight_type=QuantType.QInt8, per_channel=True,
                    extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of the fused nodes' results
                )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(ids, mask):
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        return torch.from_numpy(session.run(None, feed)[0])

    return run_batches(forward, inputs)


def _export_onnx(checkpoint: pathlib.Path, path: pathlib.Path) -> None:
    from onnxruntime.transformers import optimizer

    module = _Traceable(checkpoint, "eager")
    config = module.model.config
    axes = {0: "batch", 1: "length"}
    plain = path.with_suffix(".plain.onnx")
    with quiet():
        torch.onnx.export(
            module,
            _example(),
            plain,
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes, "last_hidden_state": axes},
            opset_version=17,
            dynamo=False,
        )
        optimizer.optimize_model(
            str(plain), model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
        ).save_model_to_file(str(path))
    plain.unlink()


def openvino_encoder(inputs: EncoderInputs, int8: bool = False, precision: str = "f32") -> Callable:
    """OpenVINO's CPU plugin, latency hint. int8: nncf's, which sees two batches. precision: of other arithmetic."""
    return run_batches(openvino_forward(inputs, int8, precision), inputs)


def openvino_forward(inputs: EncoderInputs, int8: bool = False, precision: str = "f32") -> Callable:
    """(input_ids, attention_mask) -> last hidden state, by OpenVINO. precision: of its arithmetic."""
    import openvino

    with quiet(), torch.no_grad():
        ids, mask = _example()
        model = openvino.convert_model(
            _Traceable(inputs.checkpoint, "sdpa"), example_input={"input_ids": ids, "attention_mask": mask}
        )
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    if int8:
        import nncf

        seen = nncf.Dataset([{"input_ids": i.numpy(), "attention_mask": m.numpy()} for i, m in inputs.batches[:2]])
        with quiet():
            model = nncf.quantize(model, seen, model_type=nncf.ModelType.TRANSFORMER, subset_size=2)
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def forward(ids, mask):
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        return torch.from_numpy(next(iter(request.infer(feed).values())).copy())

    return forward


def ctranslate2_encoder(inputs: EncoderInputs, compute_type: str) -> Callable:
    """CTranslate2's Encoder, which takes the token ids without their padding."""
    import ctranslate2

    path = folder() / f"{inputs.checkpoint.name}-ctranslate2"
    if not (path / "model.bin").exists():
        with quiet():
            converter = ctranslate2.converters.TransformersConverter(str(inputs.checkpoint))
            converter.convert(str(path), force=True)
    encoder = ctranslate2.Encoder(
        str(path), device="cpu", compute_type=compute_type, intra_threads=torch.get_num_threads()
    )
    ragged = [[row[: int(m.sum())].tolist() for row, m in zip(ids, mask)] for ids, mask in inputs.batches]

    def call():
        return [torch.from_numpy(np.array(encoder.forward_batch(rows).last_hidden_state)) for rows in ragged]

    return call
