"""Code that encoder-decoder families share: the two stacks, and the base model that joins them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqModelOutput,
)

from .. import ops
from .._transformers import CACHE_NAME, cached
from ..generation import StepDescription
from ..layers import BeyondFastPath, SlotTable
from ._base import Encoded, ModelMixin, Outputs, Want
from ._heads import IGNORE
from ._layer import kept_layers
from ._run_stack import Context, Inputs, Stack, decoding_cache, run_stack

__all__ = [
    "DecoderInputs",
    "Joined",
    "JoinedForward",
    "Seq2SeqBase",
    "Seq2SeqModel",
    "Shifts",
    "StackBase",
    "describe_decoder",
    "shift_right",
    "wrap_right",
]


class StackBase(Stack, ModelMixin):
    """For a family's encoder and decoder, which are separate modules in HF's tree."""

    embed_tokens: Any

    def _slots(self) -> SlotTable:
        raise NotImplementedError

    def _step_parts(self) -> dict[str, Any]:
        """Arguments of StepDescription other than layers, token embedding and head."""
        raise NotImplementedError

    def _words(self) -> Any:
        return self.embed_tokens

    def _prefix(self) -> str:
        return "decoder_" if self._decodes() and self.config.is_encoder_decoder else ""

    def _documents(self, inputs: Inputs, shape: tuple[int, int], kwargs: dict) -> torch.Tensor | None:
        return None  # one document per row in encoder-decoders

    def _called_layers(self) -> list[nn.Module]:
        return kept_layers(self, self._layers())

    def _encode(self, want: Want | None, input_ids, attention_mask, inputs_embeds, kwargs):
        """An encoder's forward: returns Encoded when one of our models calls, else HF's output."""
        inputs = Inputs(input_ids, attention_mask, inputs_embeds=inputs_embeds)
        encoded = run_stack(self, inputs, want or Want(), kwargs)
        if want is not None:
            return encoded
        if self._averages_nothing() and encoded.unpadding.hollow:
            raise BeyondFastPath("cross-attention reads the states of a row without tokens")
        return self._finish(self._encoder_output(encoded), kwargs)

    def _encoder_output(self, encoded: Encoded):
        return BaseModelOutput(last_hidden_state=encoded.restored(), **encoded.extras())

    def _decode(
        self, want: Want | None, input_ids, attention_mask, encoder_states, encoder_mask, past_key_values,
        inputs_embeds, use_cache, kwargs,
    ):  # fmt: skip
        """A decoder's forward: returns Encoded when one of our models calls, else HF's output."""
        unpadding = kwargs.pop("encoder_unpadding", None)
        crosses = encoder_states is not None or self.config.is_encoder_decoder
        cache, use_cache = decoding_cache(self, past_key_values, use_cache, crosses=crosses)
        encoded = run_stack(
            self, Inputs(input_ids, attention_mask, inputs_embeds=inputs_embeds), want or Want(), kwargs,
            Context(cache, use_cache or cache is not None, encoder_states, encoder_mask, unpadding),
        )  # fmt: skip
        if want is not None:
            return encoded
        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=encoded.restored(), **cached(encoded.past_key_values), **encoded.extras(cross=True)
        )
        return self._finish(output, kwargs)


def describe_decoder(model: nn.Module, decoder: Any, head: nn.Module, cross: bool = True, **head_parts: Any):
    """The decoder's StepDescription for the generation engine. cross=False: without cross-attention."""
    slots = decoder._slots()
    layers = [slots.read(layer) for layer in decoder._layers()]
    if not cross:
        nothing = dict.fromkeys((f"cross_{part}" for part in ("query", "key", "value", "output", "norm")), None)
        layers = [w._replace(**nothing) for w in layers]
    return StepDescription(
        model, layers, decoder._spec(True), decoder.embed_tokens, head, **decoder._step_parts(), **head_parts
    )  # fmt: skip


class DecoderInputs(NamedTuple):
    """The arguments of an encoder-decoder's forward, by HF's names; ids and masks (B, S), embeddings (B, S, E)."""

    input_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    decoder_input_ids: torch.Tensor | None = None
    decoder_attention_mask: torch.Tensor | None = None
    encoder_outputs: Any = None
    past_key_values: Any = None
    inputs_embeds: torch.Tensor | None = None
    decoder_inputs_embeds: torch.Tensor | None = None
    use_cache: bool | None = None

    def starting_with(
        self, shifted: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor | None
    ) -> "DecoderInputs":
        """Fill in decoder_input_ids = shifted(labels or input_ids) if no decoder inputs were given."""
        if self.decoder_input_ids is not None or self.decoder_inputs_embeds is not None:
            return self
        if tokens is None:
            raise ValueError("decoder_input_ids: wanted them, or decoder_inputs_embeds, or input_ids, got none")
        return self._replace(decoder_input_ids=shifted(tokens))


def shift_right(config, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (B, S) shifted right by one, config.decoder_start_token_id first; -100 becomes config.pad_token_id."""
    ops.parallel.refuse("decoder_input_ids: the token before a position", "give the part of decoder_input_ids too")
    start, padding = (_special_token(config, name) for name in ("decoder_start_token_id", "pad_token_id"))
    shifted = tokens.roll(1, -1)
    shifted[..., 0] = start
    return shifted.masked_fill_(shifted == IGNORE, padding)


def wrap_right(config, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (B, S) shifted right by one. First comes each row's last token before padding: mBART's language code."""
    padding = _special_token(config, "pad_token_id")
    tokens = tokens.masked_fill(tokens == IGNORE, padding)
    last = (tokens != padding).sum(1, keepdim=True) - 1
    return torch.cat((tokens.gather(1, last.clamp(min=0)), tokens[:, :-1]), 1)


def _special_token(config, name: str) -> int:
    token = getattr(config, name)
    if token is None:
        raise ValueError(f"config.{name}: wanted a token to make decoder_input_ids with, got None")
    return token


class Joined(NamedTuple):
    """The outputs of both stacks: the decoder's before padding is restored, the encoder's as HF's output class."""

    decoder: Encoded
    encoder: Any

    def extras(self) -> dict:
        """The fields common to the output classes of encoder-decoders, by HF's names."""
        decoder, encoder = self
        return {
            CACHE_NAME: decoder.past_key_values,
            "decoder_hidden_states": decoder.hidden_states,
            "decoder_attentions": decoder.attentions,
            "cross_attentions": decoder.cross_attentions,
            "encoder_last_hidden_state": encoder.last_hidden_state,
            "encoder_hidden_states": encoder.hidden_states,
            "encoder_attentions": encoder.attentions,
        }


class Shifts:
    """For models that make decoder_input_ids from labels.

    _starts_with_input: without labels, from input_ids.
    """

    config: Any
    _starts_with_input = False

    def _shifted(self, tokens: torch.Tensor) -> torch.Tensor:
        return shift_right(self.config, tokens)

    def _started(self, given: DecoderInputs) -> DecoderInputs:
        return given.starting_with(self._shifted, given.input_ids) if self._starts_with_input else given


class Seq2SeqBase(Shifts, Outputs):
    """For the module that owns `encoder` and `decoder`."""

    encoder: Any
    decoder: Any

    def _join(self, given: DecoderInputs, want: Want, kwargs: dict) -> Joined:
        options = {k: v for k, v in kwargs.items() if k != "return_dict"}
        mask, unpadding, outputs = given.attention_mask, None, given.encoder_outputs
        if outputs is None:
            encoded = self.encoder(given.input_ids, mask, inputs_embeds=given.inputs_embeds, want=Want(), **options)
            states = encoded.rows
            if mask is None or mask.dim() == 2:
                unpadding = encoded.unpadding
            outputs = BaseModelOutput(last_hidden_state=encoded.restored(), **encoded.extras())
        else:
            if not isinstance(outputs, BaseModelOutput):
                outputs = BaseModelOutput(*outputs[:3])
            states = outputs.last_hidden_state
        decoded = self.decoder(
            given.decoder_input_ids, given.decoder_attention_mask, encoder_hidden_states=states,
            encoder_attention_mask=mask, past_key_values=given.past_key_values,
            inputs_embeds=given.decoder_inputs_embeds, use_cache=given.use_cache, want=want,
            encoder_unpadding=unpadding, **options,
        )  # fmt: skip
        return Joined(decoded, outputs)


class JoinedForward(Seq2SeqBase):
    """The forward of a base model: both stacks, no head."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        """Run the encoder over the source and the decoder over the target; arguments and outputs as in HF's models.

        Padding is dropped where a mask marks it; outputs there are zeros.

        Args:
            input_ids: (B, S) int32 or int64, the source.
            attention_mask: (B, S), nonzero for the source's tokens.
            decoder_input_ids: (B, T) int32 or int64, the target's tokens before each position.
            decoder_attention_mask: (B, T), nonzero for the target's tokens.
            encoder_outputs: the encoder's output, in place of input_ids.
            past_key_values: an EncoderDecoderCache.
            inputs_embeds: (B, S, d_model), in place of input_ids.
            decoder_inputs_embeds: (B, T, d_model), in place of decoder_input_ids.
            use_cache: also return the cache; default: the configuration's.

        Returns:
            Seq2SeqModelOutput: last_hidden_state of the decoder, (B, T, d_model); encoder_last_hidden_state.

        Raises:
            TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.
        """
        want = kwargs.pop("want", None)  # passed by our heads, which read unpadded rows
        given = DecoderInputs(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, past_key_values,
            inputs_embeds, decoder_inputs_embeds, use_cache,
        )  # fmt: skip
        joined = self._join(self._started(given), want or Want(), kwargs)
        if want is not None:
            return joined
        output = Seq2SeqModelOutput(last_hidden_state=joined.decoder.restored(), **joined.extras())
        return self._finish(output, kwargs)


class Seq2SeqModel(JoinedForward, ModelMixin):
    """The base model of a family."""
