"""verify(checkpoint): compares this package's outputs, gradients and generated tokens with Hugging Face's, row by
row."""

import collections
import copy
import dataclasses
import importlib
import importlib.metadata
import logging
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ._version import TRANSFORMERS, old_transformers
from .verify_tokens import NEW_TOKENS, compare_tokens

__all__ = ["DTYPES", "Row", "Verification", "VerifyError", "verify"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Our error against float64 may be these factors times that of Hugging Face's eager attention in the same dtype. If that
# happens to be exact, the floor in units in the last place (ulps) of the largest value applies.
OUTPUT_FACTOR, GRADIENT_FACTOR, FLOOR_ULPS = 2.0, 3.0, 2.0
LENGTHS = (23, 9, 1, 14)
_REFERENCE = "transformer_fast_verify_reference"


class VerifyError(ValueError):
    """Raised for a checkpoint that cannot be verified; the message is one line."""


class Row(NamedTuple):
    """One comparison. ours, theirs: largest errors against float64. same: None if there is nothing to compare. note:
    the reason if same is None, or where the difference is if same is False."""

    dtype: str
    padding: str
    what: str
    ours: float
    theirs: float
    same: bool | None
    note: str


@dataclasses.dataclass
class Verification:
    """The result of verify. model: Hugging Face's class. through: our class, or `accelerate`. release: the release of
    transformers. rows: all comparisons."""

    model: str
    through: str
    release: str
    rows: list[Row]

    @property
    def same(self) -> bool:
        return all(row.same is not False for row in self.rows)


def verify(
    checkpoint: str | os.PathLike,
    *,
    dtypes: Sequence[str] = ("fp32", "bf16", "fp16"),
    gradients: bool = True,
    tokens: bool = True,
    device: str = "cpu",
    progress: Callable[[str], object] = lambda text: None,
) -> Verification:
    """Load a checkpoint with Hugging Face's class and with ours and compare outputs, parameter gradients and tokens.

    The inputs are ragged batches of random tokens with right and left padding, in evaluation mode. All positions that
    are not padding are compared, and pooled outputs if they do not read padding. Both models are compared with the same
    model in float64: our error may be at most OUTPUT_FACTOR (for gradients GRADIENT_FACTOR) times that of Hugging
    Face's eager attention in the same dtype. Models that generate must generate the same tokens (`verify_tokens`).

    Args:
        checkpoint: a folder, or a name on the hub. Hugging Face's class is the one that config.json names. Ours is the
            class of that name in this package, or a copy of the model under `accelerate` if there is none.
        dtypes: names in DTYPES.
        gradients: compare the gradients of the parameters.
        tokens: compare the results of `generate` from ragged padded prompts: greedy, beam search, and sampling with a
            seed.
        device: "cpu" or "cuda".
        progress: called with a text before each step.

    Returns:
        A `Verification`; its property `same` is the verdict.

    Raises:
        VerifyError: if the checkpoint or transformers is missing or broken, or the model is of an unknown kind; the
            message is one line.

    Examples:
        >>> from transformer_fast.demo import locate
        >>> from transformer_fast.verify import verify
        >>> verify(locate(), dtypes=["fp32"], gradients=False).same
        True
    """
    unknown = [name for name in dtypes if name not in DTYPES]
    if unknown:
        raise VerifyError(f"dtype: wanted some of {', '.join(DTYPES)}, got {', '.join(unknown)}")
    progress("loading")
    theirs = _load_theirs(checkpoint).to(device)
    ours, through = _load_ours(checkpoint, theirs)
    result = Verification(type(theirs).__name__, through, importlib.metadata.version("transformers"), [])
    result.rows.append(_compare_weights(theirs, ours))
    batches = list(_batches(theirs))
    truths = {}
    progress("float64")
    reference = _reference(theirs)
    for padding, inputs, real in batches:
        truths[padding] = _run(reference, inputs, real, padding, torch.float64, gradients)
    for name in dtypes:
        plain, mine = (_cast(model, DTYPES[name]) for model in (theirs, ours))
        for padding, inputs, real in batches:
            progress(f"{name}, padding {padding}")
            eager, found = (_run(m, inputs, real, padding, DTYPES[name], gradients) for m in (plain, mine))
            result.rows += _compare(name, padding, real, found, truths[padding], eager)
        if tokens and _generates(theirs):
            progress(f"{name}, tokens")
            result.rows += _compare_tokens(name, plain, mine, reference, batches, result.rows)
    return result


def _generates(model) -> bool:
    return model.main_input_name == "input_ids" and model.can_generate()


def _compare_tokens(name: str, theirs, ours, reference, batches, rows: list[Row]) -> Iterator[Row]:
    padding = "right" if theirs.config.is_encoder_decoder else "left"
    inputs = next(inputs for side, inputs, _ in batches if side == padding)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    logits = [row for row in rows if (row.dtype, row.what) == (name, "logits") and row.same is not None]
    error = max((max(row.ours, row.theirs) for row in logits), default=torch.finfo(DTYPES[name]).eps)
    for found in compare_tokens(theirs, ours, reference, inputs, error):
        yield Row(name, padding, f"tokens, {found.mode}", 0.0, 0.0, found.same, found.note)


# ---- loading --------------------------------------------------------------------------------------------
def load_as_named(checkpoint, prefer_ours: bool = False, **kwargs) -> Any:
    """The model of the class that config.json names, of transformers; of this package if it alone has the class, or if
    it has it and `prefer_ours`. kwargs: for from_pretrained. Raises VerifyError, in one line."""
    try:
        import transformers
    except ImportError as error:
        raise VerifyError(f"verify needs transformers: pip install '{TRANSFORMERS}' ({error})") from error
    if old := old_transformers():
        raise VerifyError(f"verify: {old}")
    import transformer_fast

    from .models._loading import explain_broken, local_folder, model_type_of
    from .models.registry import FAMILIES

    with _quiet():
        try:
            kind = model_type_of(checkpoint, {})
            if kind in FAMILIES:  # a family that transformers lacks registers its configuration when it is imported
                importlib.import_module(f".models.{FAMILIES[kind]}", __package__)
            if kind is not None and kind not in transformers.CONFIG_MAPPING:
                raise ValueError(f"transformers {transformers.__version__} has no model_type {kind!r}")
            config = transformers.AutoConfig.from_pretrained(checkpoint)
            named = next(iter(getattr(config, "architectures", None) or ()), "")
            own = getattr(transformer_fast, named, None) if named in transformer_fast.__all__ else None
            theirs = getattr(transformers, named, None)
            auto = transformer_fast.AutoModel if prefer_ours else transformers.AutoModel
            cls = (own or theirs if prefer_ours else theirs or own) or auto
            try:
                return cls.from_pretrained(checkpoint, **kwargs).eval()
            except Exception as error:
                explain_broken(error, checkpoint, local_folder(checkpoint, {}))
                raise
        except Exception as error:  # a broken file can raise anything; users get one line
            text = textwrap.shorten(str(error), 600, placeholder=" ...")
            raise VerifyError(f"{checkpoint}: cannot be loaded: {text} [{type(error).__name__}]") from error


def _load_theirs(checkpoint) -> torch.nn.Module:
    model = load_as_named(checkpoint, dtype=torch.float32, attn_implementation="eager")
    if getattr(model, "hf_quantizer", None) is not None:
        method = model.hf_quantizer.quantization_config.quant_method
        raise VerifyError(
            f"{checkpoint}: is quantised already ({method}); give the floating-point checkpoint that it was made from"
        )
    return model


def _load_ours(checkpoint, theirs) -> tuple[Any, str]:
    import transformer_fast

    cls: Any = getattr(transformer_fast, type(theirs).__name__, None)
    if cls is not None and transformer_fast.is_ours(cls) and issubclass(cls, type(theirs)):
        with _quiet():
            try:
                model = cls.from_pretrained(checkpoint, dtype=torch.float32)
            except (OSError, ValueError) as error:
                raise VerifyError(f"{checkpoint}: {' '.join(str(error).split())}") from error
        return model.to(theirs.device).eval(), f"transformer_fast.{cls.__name__}"
    model = copy.deepcopy(theirs)
    report = transformer_fast.accelerate(model, verbose=False)
    counts = collections.Counter(kind for path, kind in report.swapped.items() if not path.startswith("attention"))
    swapped = ["attention"] * any(path.startswith("attention") for path in report.swapped)
    swapped += [f"{n} x {kind}" for kind, n in counts.items()]
    return model, f"transformer_fast.accelerate: {', '.join(swapped) or 'nothing swapped'}"


class _quiet:
    """Suppresses transformers' loading reports and progress bars."""

    def __enter__(self):
        from transformers.utils import logging as hf_logging

        self.verbosity = hf_logging.get_verbosity()
        self.bars = hf_logging.is_progress_bar_enabled()
        hf_logging.set_verbosity(logging.CRITICAL)
        hf_logging.disable_progress_bar()

    def __exit__(self, *_):
        from transformers.utils import logging as hf_logging

        hf_logging.set_verbosity(self.verbosity)
        if self.bars:
            hf_logging.enable_progress_bar()


def _compare_weights(theirs, ours) -> Row:
    """Compare names and bits of the weights, then copy theirs to ours: weights that are missing in the checkpoint are
    random in both."""
    a, b = theirs.state_dict(), ours.state_dict()
    different = sorted(a.keys() ^ b.keys()) or [name for name in a if not torch.equal(a[name], b[name])]
    ours.load_state_dict(a)
    note = ""
    if different:
        note = f"{', '.join(different[:3])}{' ...' if len(different) > 3 else ''}: random or not the same; copied"
    return Row("", "", f"weights ({len(a)})", 0.0, 0.0, None if different else True, note)


# ---- inputs ---------------------------------------------------------------------------------------------
def _batches(model) -> Iterator[tuple[str, dict[str, torch.Tensor], torch.Tensor | None]]:
    """Yields (padding side, inputs, mask (B, S) of the positions that are not padding, or None)."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    text = config.get_text_config()
    if model.main_input_name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size if isinstance(config.image_size, (tuple, list)) else [config.image_size] * 2
        pixels = torch.randn(2, getattr(config, "num_channels", 3), *size, generator=generator)
        yield "none", {"pixel_values": pixels.to(model.device)}, None
        return
    if model.main_input_name != "input_ids":
        raise VerifyError(
            f"{type(model).__name__}: takes {model.main_input_name}; verify knows models of input_ids and pixel_values"
        )
    limit = (getattr(text, "max_position_embeddings", None) or 2 * max(LENGTHS)) - NEW_TOKENS
    lengths = torch.tensor([min(n, max(limit - 4, 1)) for n in LENGTHS])[:, None]
    longest, pad = int(lengths.max()), getattr(text, "pad_token_id", None) or 0
    special = {pad, *(getattr(text, f"{name}_token_id", None) for name in ("bos", "eos", "sep", "cls", "mask"))}
    usual = torch.tensor([i for i in range(min(text.vocab_size, 30000)) if i not in special])

    def tokens(length: int) -> torch.Tensor:
        return usual[torch.randint(len(usual), (len(LENGTHS), length), generator=generator)]

    ids, target, position = tokens(longest), tokens(7), torch.arange(longest)
    for padding in ("right", "left"):
        real = position < lengths if padding == "right" else position >= longest - lengths
        inputs = {"input_ids": ids.where(real, pad), "attention_mask": real.long()}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = target
        yield padding, {name: t.to(model.device) for name, t in inputs.items()}, real.to(model.device)


# ---- running --------------------------------------------------------------------------------------------
def _cast(model, dtype: torch.dtype):
    return copy.deepcopy(model).to(dtype)


def _reference(theirs):
    """The model in float64, with a plain attention in float64: HF's eager attention computes its softmax in float32."""
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    def dense_mask(*args, allow_is_causal_skip=None, allow_is_bidirectional_skip=None, **kwargs):
        return sdpa_mask(*args, allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **kwargs)

    AttentionInterface.register(_REFERENCE, _reference_attention)
    AttentionMaskInterface.register(_REFERENCE, dense_mask)
    model = _cast(theirs, torch.float64)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(_REFERENCE)
    return model


def _reference_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, position_bias=None, softcap=None, s_aux=None,
    **kwargs,
):  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if position_bias is None else scores + position_bias
    if attention_mask is not None:
        nothing = ~attention_mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~attention_mask, -torch.inf).masked_fill(nothing, 0.0)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores)], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2), weights


class _Result(NamedTuple):
    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def _run(model, inputs, real, padding: str, dtype, gradients: bool) -> _Result:
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    model.requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        found = model(**inputs)
        outputs = dict(_readable(found, real, padding))
    if gradients and outputs:
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(t.shape, generator=generator).to(t) for t in outputs.values()]
        torch.autograd.backward(list(outputs.values()), cotangents)
    grads = {}
    for name, p in model.named_parameters() if gradients else ():
        grads[name] = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = None
    return _Result({name: t.detach() for name, t in outputs.items()}, grads)


def _readable(found, real, padding: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the outputs that do not depend on padding: without padded positions if they have positions, else whole."""
    for name, t in found.items():
        if not isinstance(t, torch.Tensor) or not t.is_floating_point() or not t.dim():
            continue
        if real is not None and tuple(t.shape[:2]) == tuple(real.shape):
            yield name, t[real]
        elif padding != "left" or "decoder" in name or (name == "logits" and t.dim() == 3):
            yield name, t


# ---- comparing ------------------------------------------------------------------------------------------
def _compare(dtype: str, padding: str, real, ours: _Result, truth: _Result, eager: _Result) -> Iterator[Row]:
    if not truth.outputs:
        yield Row(dtype, padding, "outputs", 0.0, 0.0, None, "this head reads padded positions: nothing to compare")
        return
    for name, t in truth.outputs.items():
        yield _judge(dtype, padding, name, real, ours.outputs[name], t, eager.outputs[name], OUTPUT_FACTOR)
    if truth.gradients:
        # All parameters in one vector, each scaled by its size: the error of one small tensor depends on chance.
        top = max(t.abs().max().item() for t in truth.gradients.values() if t.numel())
        scale = {name: max(t.abs().max().item(), 0.05 * top) for name, t in truth.gradients.items() if t.numel()}
        pooled = [torch.cat([(r.gradients[n] / s).flatten() for n, s in scale.items()]) for r in (ours, truth, eager)]
        mine, exact, plain = pooled
        row = _judge(dtype, padding, f"gradients ({len(scale)})", None, mine, exact, plain, GRADIENT_FACTOR)
        if row.same is False:
            worst = max(
                scale, key=lambda n: ((ours.gradients[n].double() - truth.gradients[n]) / scale[n]).abs().max().item()
            )
            row = row._replace(note=f"worst: {worst}")
        yield row


def _judge(dtype: str, padding: str, what: str, real, ours, truth, eager, factor: float) -> Row:
    if not eager.isfinite().all():
        return Row(dtype, padding, what, 0.0, 0.0, None, "Hugging Face itself overflows here")
    if not truth.isfinite().all():  # Bloom with left padding: the smallest number plus ALiBi's bias is -inf in float64
        return Row(dtype, padding, what, 0.0, 0.0, None, "Hugging Face itself overflows in float64 here")
    error, theirs = (ours.double() - truth).abs(), (eager.double() - truth).abs()
    if theirs.max() > 0.5 * truth.abs().max():
        return Row(dtype, padding, what, 0.0, 0.0, None, "Hugging Face itself is too far from float64 here")
    floor = FLOOR_ULPS * torch.finfo(ours.dtype).eps * truth.abs().max().item()
    largest = factor * max(theirs.max().item(), floor)
    typical = factor * max(theirs.square().mean().sqrt().item(), floor / 4)
    within = bool(error.max() <= largest) and bool(error.square().mean().sqrt() <= typical)  # NaN is never within
    note = "" if within else _where(error, largest, real)
    return Row(dtype, padding, what, error.max().item(), theirs.max().item(), within, note)


def _where(error, bound: float, real) -> str:
    """The positions of a batch that are over the bound, or the number of elements."""
    off = ~(error <= bound)
    if real is None or not off.dim() > 1 or len(error) != int(real.sum()):
        return f"{int(off.sum())} of {off.numel()} elements over {bound:.1e}"
    rows = torch.nonzero(real)[off.flatten(1).any(1)].tolist()
    named = ", ".join(f"sentence {b} position {i}" for b, i in rows[:3])
    return f"{len(rows)} of {len(error)} rows over {bound:.1e}{': ' if rows else ''}{named}"
