"""The parts of transformers that this package uses although they are private or differ between releases.

The functions here read such names. Names that must be overridden, or that cannot be read through a function, are only
listed in EXPECTED, with what is expected of them. Tests compare the list with the installed release and with this
package's source. So a release that changes one of them fails a test with that name.
"""

import functools
import inspect
import re
import sys
import warnings
from typing import Any, NamedTuple

import torch
import transformers
from transformers import core_model_loading
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import output_capturing

__all__ = [
    "CACHE_NAME",
    "CACHE_NAMES",
    "EXPECTED",
    "IS_TESTED",
    "NEWEST",
    "OLDEST",
    "Expected",
    "cached",
    "collects_outputs",
    "config_takes_attention",
    "end_tokens",
    "holds_attention",
    "is_capturing_hook",
    "merge_cache_names",
    "name_or_path",
    "names_when_saved",
    "pad_token",
    "recomputed",
    "recorded_outputs",
    "register_outputs",
    "set_attention",
    "stored_attention",
    "takes_attention",
]

# The oldest and the newest release that the tests run with: (major, minor).
OLDEST, NEWEST = (5, 17), (5, 24)


def _is_tested(version: str) -> bool:
    return OLDEST <= tuple(int(part) for part in version.split(".")[:2]) <= NEWEST


IS_TESTED = _is_tested(transformers.__version__)
if not IS_TESTED:
    warnings.warn(
        f"transformers {transformers.__version__} is not one of the releases that transformer_fast is tested with "
        f"({OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}). Each model class is compared with transformers' own on "
        "a tiny model when it is first used; a class that differs runs as transformers' own, without fused kernels",
        stacklevel=2,
    )

# ---- the cache --------------------------------------------------------------------------------------------
# The names of the key-value cache in forward, generate and outputs, over all releases.
CACHE_NAMES = ("past_key_values", "cache", "cache_params")
# The name in the installed release: `cache` since 5.24.
CACHE_NAME = next(name for name in CACHE_NAMES[1::-1] if name in BaseModelOutputWithPast.__dataclass_fields__)


def cached(cache: Any) -> dict[str, Any]:
    """The cache as a keyword argument for an output class or a function of transformers."""
    return {CACHE_NAME: cache}


def merge_cache_names(arguments: dict, name: str, where: str) -> dict:
    """`arguments` with the cache under `name`, whichever of CACHE_NAMES it was passed as.

    Raises ValueError if two of these names have different caches. where: the function, for the message.
    """
    given = {k: arguments[k] for k in CACHE_NAMES if k in arguments}
    if not given:
        return arguments
    caches = {k: v for k, v in given.items() if v is not None}
    first = next(iter(caches.values()), None)
    if any(v is not first for v in caches.values()):
        raise ValueError(f"{', '.join(caches)}: are names of one argument of {where}; wanted one cache, got different")
    return {**{k: v for k, v in arguments.items() if k not in given}, name: first}


# ---- generation -------------------------------------------------------------------------------------------
def end_tokens(generation_config: Any) -> Any:
    """(n,) int64, the tokens that end a row, or None. generate sets them before a decoding loop."""
    return generation_config._eos_token_tensor


def pad_token(generation_config: Any) -> Any:
    """() int64, the token that fills finished rows, or None; set as `end_tokens`."""
    return generation_config._pad_token_tensor


# ---- configurations, attention ----------------------------------------------------------------------------
def name_or_path(config: Any) -> str:
    """Where a model was loaded from; "" if it was not loaded."""
    return getattr(config, "_name_or_path", "")


def takes_attention(model: Any) -> bool:
    """Whether a model asks the attention interface for its attention. transformers looks into the file of the model's
    class; a subclass has its layers from another."""
    parts = (m for m in model.modules() if getattr(m, "config", None) is model.config)
    files = {cls.__module__ for part in parts for cls in type(part).__mro__}
    return model._can_set_attn_implementation() and not any(_writes_attention(name) for name in files)


@torch.compiler.assume_constant_result
def config_takes_attention(kind: type) -> bool:
    """The same of the models of transformers that have a configuration of class `kind`; warns once where not."""
    if kind not in _takes:
        _takes[kind] = not any(_writes_attention(cls.__module__) for cls in _models_of(kind))
        if not _takes[kind]:
            warnings.warn(
                f"attn_implementation: transformers has attention written into the models of {kind.__name__}; it stays "
                "as it is",
                stacklevel=2,
            )
    return _takes[kind]


_takes: dict[type, bool] = {}
_tells: dict[type, bool] = {}


@torch.compiler.assume_constant_result
def modules_tell_causality(kind: type) -> bool:
    """Whether `is_causal` of the attention modules is true of models that have a configuration of class `kind`. Only
    models that support sdpa need it: with eager attention the mask alone decides."""
    if kind not in _tells:
        _tells[kind] = all(
            cls._supports_sdpa for cls in _models_of(kind) if issubclass(cls, transformers.PreTrainedModel)
        )
    return _tells[kind]


def _models_of(kind: type) -> list[type]:
    """The classes of transformers whose configuration is of class `kind`."""
    bases = set(kind.__mro__)
    return [
        cls
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.") and ".modeling_" in name
        for cls in vars(module).values()
        if isinstance(cls, type) and getattr(cls, "config_class", None) in bases
    ]


@functools.cache
def _writes_attention(name: str) -> bool:
    """Whether a file of transformers has attention written into its layers, which no implementation replaces, or into
    some of them (BigBird-Pegasus's encoder, GIT's text layers)."""
    if not name.startswith("transformers.models."):
        return False
    parts = re.split(r"^(?=class |def |@)", inspect.getsource(sys.modules[name]), flags=re.MULTILINE)
    layers = [part for part in parts if re.match(r"class \w*Attention\w*\(nn\.Module\):", part)]
    if not any("ALL_ATTENTION_FUNCTIONS" in part for part in parts):
        return bool(layers)
    return any(
        "softmax(" in part and "ALL_ATTENTION_FUNCTIONS" not in part and re.search(r"\+ attention_mask\b", part)
        for part in layers
    )


def stored_attention(config: Any) -> Any:
    """The attention implementation that is set in a configuration, or None."""
    return config._attn_implementation


def set_attention(config: Any, implementation: Any) -> None:
    """Set the attention implementation of a configuration, without transformers' checks."""
    config._attn_implementation_internal = implementation


def holds_attention(config: Any) -> bool:
    return hasattr(config, "_attn_implementation_internal")


def recorded_outputs(compiling: bool) -> Any:
    """The names of the outputs that transformers collects from submodules in the current forward pass, or None."""
    collector = output_capturing._active_collector
    return collector.global_var if compiling else collector.get()


def collects_outputs() -> bool:
    """True inside a forward pass of transformers that collects hidden states or attentions by hooks."""
    return bool(recorded_outputs(False))


def register_outputs(model: Any) -> None:
    """Tell transformers which outputs of submodules a model of this class can return. It looks them up by class."""
    registry = output_capturing._CAN_RECORD_REGISTRY
    key: Any = str(model.__class__) if type(registry) is dict else model  # newer registries take the model itself
    registry[key] = model._can_record_outputs


def recomputed(model: Any, function: Any, *inputs: Any) -> Any:
    """function(*inputs) under gradient checkpointing, with the settings of gradient_checkpointing_enable."""
    return model._gradient_checkpointing_func(function, *inputs)


def is_capturing_hook(hook: Any) -> bool:
    """True for the hooks that transformers installs on layers to collect outputs. They do nothing unless requested."""
    return (
        getattr(hook, "__module__", "") == output_capturing.__name__
        and getattr(hook, "__name__", "") == "output_capturing_hook"
    )


def names_when_saved(model: Any, names: list[str]) -> dict[str, str]:
    """{name of a parameter: its name in checkpoints}, which is another for some models."""
    marks = {name: torch.empty(0, device="meta") for name in names}
    back = {id(t): name for name, t in marks.items()}
    saved = core_model_loading.revert_weight_conversion(model, dict(marks))
    return {back[id(t)]: name for name, t in saved.items() if id(t) in back}


# ---- the list ---------------------------------------------------------------------------------------------
class Expected(NamedTuple):
    """path: "module:Class.attribute" below transformers. parameters: the names of a function's parameters, in order, as
    far as they matter ("cache" stands for CACHE_NAME); None if it is not a function. use: what this package does with
    it."""

    path: str
    parameters: tuple[str, ...] | None
    use: str


_LOOP = ("self", "input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus")
_MIXIN = "generation.utils:GenerationMixin"
_MASKS = "masking_utils"
_LOADS = ("_load_tokenizer", "_load_processor", "_load_image_processor", "_load_feature_extractor")
_QUANTIZER = "quantizers.base:HfQuantizer"
EXPECTED = (
    # Overridden by generation.GenerationMixin, in this order of calls.
    Expected(f"{_MIXIN}.generate", ("self", "inputs", "generation_config"), "overridden"),
    Expected(f"{_MIXIN}._extract_generation_mode_kwargs", ("self", "custom_generate", "kwargs"), "overridden"),
    Expected(
        f"{_MIXIN}._prepare_cache_for_generation", ("self", "generation_config", "model_kwargs"),
        "overridden: remembers the cache it makes",
    ),
    Expected(f"{_MIXIN}._sample", (*_LOOP, "streamer"), "overridden: the engine's loop"),
    Expected(f"{_MIXIN}._beam_search", _LOOP, "overridden: the engine's loop"),
    Expected(f"{_MIXIN}._supports_default_dynamic_cache", (), "overridden by recurrent models, which make their own"),
    Expected(
        f"{_MIXIN}.prepare_inputs_for_generation", ("self", "input_ids", "next_sequence_length", "cache"),
        "called for the prompt",
    ),
    Expected("generation.utils:GenerateDecoderOnlyOutput", ("sequences", "scores", "logits"), "made"),
    Expected("generation.utils:GenerateEncoderDecoderOutput", ("sequences", "scores", "logits"), "made"),
    Expected("generation.utils:GenerateBeamDecoderOnlyOutput", ("sequences", "sequences_scores", "scores"), "made"),
    Expected("generation.utils:GenerateBeamEncoderDecoderOutput", ("sequences", "sequences_scores", "scores"), "made"),
    Expected("generation.logits_process:MinLengthLogitsProcessor", ("min_length", "eos_token_id"), "read"),
    Expected(
        "generation.logits_process:MinNewTokensLengthLogitsProcessor",
        ("prompt_length_to_skip", "min_new_tokens", "eos_token_id"), "read",
    ),
    # Caches.
    Expected("cache_utils:Cache", ("layers",), "generation.cache.StepCache stands in for it"),
    Expected("cache_utils:Cache.update", ("self", "key_states", "value_states", "layer_idx"), "overridden, called"),
    Expected("cache_utils:Cache.get_seq_length", ("self", "layer_idx"), "overridden, called"),
    Expected("cache_utils:Cache.get_mask_sizes", ("self", "query_length", "layer_idx"), "overridden, called"),
    Expected("cache_utils:Cache.is_compileable", None, "overridden"),
    Expected("cache_utils:Cache.is_sliding", None, "overridden"),
    Expected("cache_utils:EncoderDecoderCache.is_updated", None, "read: which layers' encoder keys are stored"),
    # Attention and its masks.
    Expected("modeling_utils:AttentionInterface.register", ("key", "value"), "called"),
    Expected("masking_utils:AttentionMaskInterface.register", ("key", "value"), "called"),
    Expected(
        f"{_MASKS}:sdpa_mask",
        ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask"), "called",
    ),
    Expected(f"{_MASKS}:causal_mask_function", ("batch_idx", "head_idx", "q_idx", "kv_idx"), "recognised"),
    Expected(f"{_MASKS}:bidirectional_mask_function", ("batch_idx", "head_idx", "q_idx", "kv_idx"), "recognised"),
    Expected(f"{_MASKS}:and_masks", ("mask_functions",), "its result's closure is read"),
    Expected(f"{_MASKS}:sliding_window_overlay", ("sliding_window",), "its result's closure is read"),
    Expected(f"{_MASKS}:sliding_window_bidirectional_overlay", ("sliding_window",), "read by its closure"),
    Expected("utils.output_capturing:_active_collector", None, "read: recorded_outputs"),
    Expected("utils.output_capturing:_CAN_RECORD_REGISTRY", None, "written: register_outputs"),
    Expected("modeling_utils:PreTrainedModel._can_record_outputs", None, "read: register_outputs"),
    Expected("modeling_utils:PreTrainedModel._can_set_attn_implementation", (), "called: takes_attention"),
    Expected("configuration_utils:PreTrainedConfig._attn_implementation", None, "read, written"),
    # Models and loading.
    Expected("modeling_utils:PreTrainedModel._init_weights", ("self", "module"), "overridden by models of our own"),
    Expected("modeling_utils:PreTrainedModel._tied_weights_keys", None, "overridden by models of our own"),
    Expected("modeling_utils:PreTrainedModel._is_stateful", None, "overridden by recurrent models"),
    Expected("core_model_loading:revert_weight_conversion", ("model", "state_dict"), "called: names_when_saved"),
    Expected(f"{_QUANTIZER}.update_dtype", ("self", "dtype"), "overridden"),
    Expected(f"{_QUANTIZER}.preprocess_model", None, "calls the next with checkpoint_files"),
    Expected(f"{_QUANTIZER}._process_model_before_weight_loading", ("self", "model"), "overridden"),
    Expected(f"{_QUANTIZER}._process_model_after_weight_loading", ("self", "model"), "overridden"),
    Expected("modeling_utils:PreTrainedModel._no_split_modules", None, "overridden by models of our own"),
    Expected("modeling_utils:PreTrainedModel.gradient_checkpointing", None, "read"),
    Expected("modeling_utils:PreTrainedModel._is_hf_initialized", None, "written: what is not drawn again"),
    Expected("models.mbart.tokenization_mbart:MBartTokenizer._build_translation_inputs", (), "called where it is"),
    Expected("modeling_layers:GradientCheckpointingLayer.__call__", ("self", "args", "kwargs"), "layers are ones"),
    Expected("utils.generic:can_return_tuple", ("func",), "called"),
    Expected("models.auto.auto_factory:_BaseAutoModelClass._model_mapping", None, "overridden: our classes"),
    Expected("loss.loss_utils:ForCausalLMLoss", ("logits", "labels", "vocab_size"), "recognised"),
    # Pipelines.
    Expected("pipelines:PIPELINE_REGISTRY.register_pipeline", ("task", "pipeline_class", "pt_model"), "called"),
    Expected("pipelines.base:Pipeline._sanitize_parameters", ("self", "pipeline_parameters"), "overridden"),
    Expected("pipelines.base:Pipeline._forward", ("self", "input_tensors", "forward_parameters"), "overridden"),
    *(Expected(f"pipelines.base:Pipeline.{name}", None, "overridden") for name in _LOADS),
    Expected("pipelines.base:Pipeline._batch_size", None, "read and written"),
    Expected("pipelines.base:Pipeline._preprocess_params", None, "read"),
    Expected("pipelines.base:Pipeline.preprocess", ("self", "input_", "preprocess_parameters"), "overridden"),
    Expected("pipelines.base:Pipeline.postprocess", ("self", "model_outputs", "postprocess_parameters"), "overridden"),
)  # fmt: skip
