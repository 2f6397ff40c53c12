"""generate() with HF's signature and results, run by this package's engine where possible."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import utils as hf

from .._transformers import CACHE_NAME, merge_cache_names
from .beam import beam_search
from .decoder_state import decoder_state
from .sample import Record, sample
from .stepper import Prompt, Stepper, choose_stepper

__all__ = ["GenerationMixin"]


class GenerationMixin:
    """Replaces the decoding loops of HF's generate; HF still prepares the call. A model lists this class before HF's
    model class. It is no subclass of HF's mixin, which would change the method resolution order of models.

    Greedy decoding, sampling and beam search run on a cache that is written in place. Prompts run once, however many
    rows continue them, and finished rows are dropped. The following go to HF's loop with the model's forward: assisted
    decoding, a user's own cache, static, quantised and offloaded caches, no cache, attentions and hidden states in the
    output, chunked prompts, synced_gpus.
    """

    config: Any
    generation_config: Any
    runs_as_hugging_face = False  # True: use HF's loop and forward
    _shares_encoder_keys = True  # rows of one prompt share one set of encoder keys in cross-attention

    @functools.wraps(transformers.GenerationMixin.generate, assigned=())  # the signature
    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs):
        """HF's generate, with the same arguments and one more keyword.

        Args:
            inputs: as in HF's generate.
            *args: as in HF's generate.
            **kwargs: as in HF's generate; and generators, one torch.Generator per row (prompts times
                num_return_sequences) for sampling, so that a row's draws do not depend on the batch.

        Returns:
            As HF's generate.

        Raises:
            TypeError: for prompts that are not tensors, such as text or a tokenizer's output that was not unpacked.
            ValueError: for empty batches and prompts, and for masks of a wrong shape.
        """
        kwargs = merge_cache_names(kwargs, CACHE_NAME, "generate")
        given = {"inputs": inputs, **{k: kwargs.get(k) for k in ("input_ids", "inputs_embeds", "decoder_input_ids")}}
        for name, t in given.items():
            if t is None:
                continue
            if not isinstance(t, torch.Tensor):
                hint = "; pass a tokenizer's output as generate(**batch)" if isinstance(t, Mapping) else ""
                raise TypeError(f"{name}: wanted a tensor, got {type(t).__name__}{hint}")
            if name != "inputs_embeds" and t.dim() != 2:
                raise ValueError(f"{name}: wanted shape (batch, length), got {tuple(t.shape)}")
            if t.dim() > 1 and not t.shape[0]:
                raise ValueError(f"{name}: wanted at least one prompt, got shape {tuple(t.shape)}")
            if t.dim() > 1 and not t.shape[1] and kwargs.get("inputs_embeds") is None:
                raise ValueError(f"{name}: wanted prompts of at least one token, got shape {tuple(t.shape)}")
        mask, ids = kwargs.get("attention_mask"), inputs if inputs is not None else kwargs.get("input_ids")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            fresh = kwargs.get(CACHE_NAME) is None and kwargs.get("inputs_embeds") is None
            if fresh and isinstance(ids, torch.Tensor) and mask.shape != ids.shape:
                raise ValueError(f"attention_mask: wanted shape {tuple(ids.shape)} as the ids, got {tuple(mask.shape)}")
        for name in ("num_beams", "num_return_sequences", "num_beam_groups"):
            if (count := kwargs.get(name)) is not None and count < 1:
                raise ValueError(f"{name}: wanted at least 1, got {count}")
        generators = kwargs.get("generators")
        if generators is not None and not (
            isinstance(generators, Sequence) and all(isinstance(g, torch.Generator) for g in generators)
        ):
            raise TypeError(f"generators: wanted a list of torch.Generator, one per row, got {generators!r}")
        config = args[0] if args else kwargs.get("generation_config")
        config = self.generation_config if config is None else config
        groups = kwargs.get("num_beam_groups", getattr(config, "num_beam_groups", None))
        if groups is not None and groups > 1 and kwargs.get("custom_generate") is None:
            if kwargs.get("streamer") is not None:
                raise ValueError("streamer: wanted None with num_beam_groups > 1: beams cannot be streamed")
            kwargs["custom_generate"] = type(self)._group_beam_search  # transformers 5 has no group beam search
        return super().generate(inputs, *args, **kwargs)

    def _extract_generation_mode_kwargs(self, custom_generate, kwargs, *args, **more):
        generators = kwargs.pop("generators", None)
        found = super()._extract_generation_mode_kwargs(custom_generate, kwargs, *args, **more)
        return found if generators is None else {**found, "generators": generators}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        given = model_kwargs.get(CACHE_NAME)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get(CACHE_NAME)
        if isinstance(made, Cache):
            own = decoder_state(self).made  # without caches that a user passed
            (own.add if given is None else own.discard)(made)

    def _sample(
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None,
        generators: Sequence[torch.Generator] | None = None, **model_kwargs,
    ):  # fmt: skip
        config = generation_config
        if generators is not None and (not config.do_sample or len(generators) != len(input_ids)):
            raise ValueError(
                f"generators: wanted one for each of the {len(input_ids)} rows, and do_sample=True, got "
                f"{len(generators)} and do_sample={config.do_sample}"
            )
        copies = config.num_return_sequences if config.num_beams == 1 else 1
        stepper = self._stepper(input_ids, copies, config, synced_gpus, model_kwargs)
        if stepper is None:
            if generators is not None:
                raise ValueError("generators: can only be used with the cache that generate creates, and without beams")
            return super()._sample(
                input_ids, logits_processor, stopping_criteria, config, synced_gpus, streamer, **model_kwargs
            )
        record = Record(config)
        sequences = sample(
            stepper, input_ids, copies, logits_processor, stopping_criteria, config, streamer, generators, record
        )
        if not record.active:
            return sequences
        return self._output(stepper, record, "Generate{}Output", sequences=sequences)

    def _beam_search(
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, **model_kwargs
    ):
        config = generation_config
        if model_kwargs.pop("generators", None) is not None:
            raise ValueError("generators: only for sampling without beams; use torch.manual_seed with num_beams > 1")
        found = self._search_beams(input_ids, logits_processor, stopping_criteria, config, synced_gpus, model_kwargs)
        if found is not None:
            return found
        return super()._beam_search(input_ids, logits_processor, stopping_criteria, config, synced_gpus, **model_kwargs)

    def _search_beams(self, input_ids, logits_processor, stopping_criteria, config, synced_gpus, model_kwargs) -> Any:
        """The result of generate, or None if the engine cannot run the call."""
        stepper = None
        if not config.low_memory:
            stepper = self._stepper(input_ids, config.num_beams, config, synced_gpus, model_kwargs)
        if stepper is None:
            return None
        record = Record(config)
        found: dict[str, Any] = beam_search(stepper, input_ids, logits_processor, stopping_criteria, config, record)
        if not record.active:
            return found["sequences"]
        if not config.output_scores:
            found["sequences_scores"] = None
        return self._output(stepper, record, "GenerateBeam{}Output", **found)

    def _group_beam_search(self, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        config = generation_config
        if config.num_beams % config.num_beam_groups:
            raise ValueError(
                f"num_beam_groups: wanted a divisor of num_beams = {config.num_beams}, got {config.num_beam_groups}"
            )
        if config.do_sample:
            raise ValueError("do_sample: wanted False with num_beam_groups > 1, got True")
        if not (config.diversity_penalty or 0.0) > 0.0:
            raise ValueError(
                f"diversity_penalty: wanted a number over 0 with num_beam_groups > 1, else all groups find the same "
                f"sequences, got {config.diversity_penalty}"
            )
        result = self._search_beams(input_ids, logits_processor, stopping_criteria, config, False, model_kwargs)
        if result is None:
            raise ValueError(
                "num_beam_groups: can only be used with the cache that generate creates, and without "
                "attentions and hidden states in the output"
            )
        return result

    def _stepper(self, input_ids, copies: int, config, synced_gpus: bool, model_kwargs: dict) -> Stepper | None:
        """The Stepper for this call, or None if HF's loop must run it."""
        cache = model_kwargs.get(CACHE_NAME)
        decoder_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if (
            self.runs_as_hugging_face
            or synced_gpus
            or not self._is_our_cache(decoder_cache, config)
            or (cache is not None and cache not in decoder_state(self).made)
            or not config.use_cache
            or config.output_attentions
            or config.output_hidden_states
            or config.prefill_chunk_size is not None
            or config.is_assistant
            or torch.compiler.is_compiling()
            or _has_empty_prompts(model_kwargs)
            or (hasattr(self, "why_hf_loop") and self.why_hf_loop())
        ):
            return None
        dropped = (CACHE_NAME, "use_cache")
        inputs = {k: _first_copies(v, copies) for k, v in model_kwargs.items() if k not in dropped}
        return choose_stepper(self, Prompt(input_ids[::copies], copies, config.max_length, inputs))

    def _is_our_cache(self, cache: Any, config: Any) -> bool:
        if hasattr(self, "recurrent_step"):  # a recurrent state cannot be returned as a key-value cache
            return cache is None and not config.return_dict_in_generate
        return type(cache) is DynamicCache and not cache.offloading

    def _output(self, stepper: Stepper, record: Record, name: str, **found):
        encoder_decoder = self.config.is_encoder_decoder
        cls = getattr(hf, name.format("EncoderDecoder" if encoder_decoder else "DecoderOnly"))
        return cls(**found, **record.fields(stepper, encoder_decoder))


def _has_empty_prompts(model_kwargs: dict) -> bool:
    """Whether a mask leaves out all tokens of some prompt."""
    masks = (model_kwargs.get(name) for name in ("attention_mask", "decoder_attention_mask"))
    return any(not bool((m != 0).any(-1).all()) for m in masks if isinstance(m, torch.Tensor) and m.dim() == 2)


def _first_copies(value: Any, copies: int) -> Any:
    """The first of the `copies` equal rows that HF makes of each prompt's inputs."""
    if copies == 1:
        return value
    if isinstance(value, torch.Tensor) and value.dim():
        return value[::copies]
    if hasattr(value, "items"):  # encoder_outputs
        return type(value)(**{k: _first_copies(v, copies) for k, v in value.items()})
    return value
