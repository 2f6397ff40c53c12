"""For untested releases of transformers: each class is compared with transformers' own before it is used."""

import functools
import inspect
import warnings
from typing import Any

import torch
import transformers

from .._transformers import IS_TESTED

__all__ = ["runs_as_hugging_face"]

# Sizes of a tiny model, under the field names of all families' configurations.
_SIZES: dict[str, Any] = {
    "vocab_size": 61, "encoder_vocab_size": 61, "hidden_size": 32, "embedding_size": 16, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 48, "dim": 32, "hidden_dim": 48,
    "n_layers": 2, "n_heads": 4, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48, "d_model": 32, "d_kv": 8,
    "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "ffn_dim": 48, "readout_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 0, "forced_eos_token_id": None, "local_attention": 4, "projection_size": 16,
    "cell_size": 24, "filters": [[1, 4], [2, 8]], "attention_types": [[["global", "local"], 1]], "window_size": 4,
}  # fmt: skip
_PROMPTS = ((5, 17, 33, 8, 2), (0, 0, 21, 40, 2))
_checking = False


def runs_as_hugging_face(cls: type) -> bool:
    """Whether models of this class run transformers' own code: the release is untested, and a tiny model of the class
    computes or generates something else than transformers' own. Computed once per class and process."""
    return not (IS_TESTED or _checking) and not _agrees(cls)


@functools.cache
def _agrees(cls: type) -> bool:
    global _checking
    _checking = True
    try:
        reason = _difference(cls)
    except Exception as error:  # an unknown release may raise anything
        reason = f"{type(error).__name__}: {error}"
    finally:
        _checking = False
    if reason:
        warnings.warn(
            f"transformers {transformers.__version__}: {cls.__name__} runs as transformers' own, for a tiny model "
            f"differs ({reason})",
            stacklevel=4,
        )
    return not reason


def _difference(cls: Any) -> str:
    """'' if a tiny model of ours and of transformers' own agree, else what differs."""
    default = cls.config_class().to_dict()
    config = cls.config_class(**{k: v for k, v in _SIZES.items() if k in default})
    if any(kind in cls.__name__ for kind in ("LMHead", "CausalLM")) and "is_decoder" in default:
        config.is_decoder = True
    hugging_face = next((c for c in cls.__mro__ if c.__module__.startswith("transformers.models.")), None)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        ours = cls(config).float().eval()
        theirs = None if hugging_face is None else hugging_face(config).float().eval()
        for parameter in ours.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
        if theirs is not None:
            theirs.load_state_dict(ours.state_dict())
            if found := _forward_difference(ours, theirs):
                return found
        return _generation_difference(ours, theirs) if cls.can_generate() else ""


def _forward_difference(ours: Any, theirs: Any) -> str:
    ids = torch.tensor(_PROMPTS).clamp(min=3)
    ids[:, -1] = 2  # the end token, which classification heads read
    if "MultipleChoice" in type(ours).__name__ or "DoubleHeads" in type(ours).__name__:
        ids = ids[None]
    call = {"input_ids": ids}
    if "decoder_input_ids" in inspect.signature(theirs.forward).parameters:
        call["decoder_input_ids"] = ids
    seen, wanted = ours(**call), theirs(**call)
    if list(seen.keys()) != list(wanted.keys()):
        return f"forward returns {', '.join(seen.keys())}; wanted {', '.join(wanted.keys())}"
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor) and not _close(seen[name], value):
            return f"forward's {name}"
    return ""


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= 1e-3 * b.abs().max().clamp_min(1e-6)).all())


def _generation_difference(ours: Any, theirs: Any) -> str:
    ids = torch.tensor(_PROMPTS)
    for beams in (1, 3):
        options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 6, "do_sample": False, "num_beams": beams}
        options |= {"pad_token_id": 0, "eos_token_id": 2}
        if ours.config.is_encoder_decoder:
            options["decoder_start_token_id"] = 0
        seen = ours.generate(ids, **options)
        if theirs is None:  # HF does not have this family: compare with transformers' loop around our forward
            ours.runs_as_hugging_face = True
            wanted = ours.generate(ids, **options)
            ours.runs_as_hugging_face = False
        else:
            wanted = theirs.generate(ids, **options)
        if not torch.equal(seen, wanted):
            return f"generate with num_beams={beams}"
    return ""
