"""The configuration of the 2017 Transformer."""

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

__all__ = ["TransformerConfig"]


class TransformerConfig(PreTrainedConfig):
    """Configuration of the 2017 Transformer; the defaults are the paper's base model (table 3).

    Args:
        vocab_size: of the target.
        encoder_vocab_size: of the source, by default the same.
        d_model: width of the model.
        encoder_layers: layers of the encoder.
        decoder_layers: layers of the decoder.
        num_attention_heads: a divisor of d_model.
        ffn_dim: width inside the feed-forward block.
        activation_function: the paper's relu, or another.
        norm_position: "post", as in the paper, or "pre" (Xiong et al., 2020).
        final_norm: a norm after the last layer of either stack, by default with "pre" only; torch.nn.Transformer always
            has one.
        dropout: on embeddings and on the output of each sublayer (section 5.4).
        attention_dropout: on attention weights. Not in the paper's text, but in torch.nn.Transformer and tensor2tensor.
        activation_dropout: inside the feed-forward block. Not in the paper's text either.
        label_smoothing: in the loss.
        share_embeddings: one matrix for source, target and output (section 3.4), by default if the two vocabularies
            have the same size and tie_word_embeddings is on.
        tie_word_embeddings: one matrix for target and output.
        scale_embedding: multiply embeddings by sqrt(d_model).
        max_position_embeddings: the number of tabulated sinusoids; longer inputs are refused.

    Source:
        Vaswani et al., "Attention Is All You Need", 2017.

    Examples:
        >>> import transformer_fast
        >>> config = transformer_fast.TransformerConfig(vocab_size=100, d_model=32, num_attention_heads=4, ffn_dim=64)
        >>> model = transformer_fast.TransformerForConditionalGeneration(config)
    """

    model_type = "transformer_2017"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "encoder_layers"}

    vocab_size: int = 37000
    encoder_vocab_size: int | None = None
    d_model: int = 512
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_attention_heads: int = 8
    ffn_dim: int = 2048
    activation_function: str = "relu"
    norm_position: str = "post"
    final_norm: bool | None = None
    layer_norm_eps: float = 1e-5
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    label_smoothing: float | int = 0.1
    share_embeddings: bool | None = None
    tie_word_embeddings: bool = True
    scale_embedding: bool = True
    max_position_embeddings: int = 2048
    use_cache: bool = True
    is_encoder_decoder: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 1

    def __post_init__(self, **kwargs):
        self.encoder_vocab_size = self.encoder_vocab_size or self.vocab_size
        one_vocabulary = self.encoder_vocab_size == self.vocab_size
        if self.share_embeddings is None:
            self.share_embeddings = one_vocabulary and self.tie_word_embeddings
        if self.final_norm is None:
            self.final_norm = self.norm_position == "pre"
        if self.norm_position not in ("post", "pre"):
            raise ValueError(f"norm_position: wanted 'post' or 'pre', got {self.norm_position!r}")
        if self.d_model % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: wanted a divisor of d_model = {self.d_model}, got {self.num_attention_heads}"
            )
        if self.d_model % 2:
            raise ValueError(f"d_model: wanted an even number for sines and cosines, got {self.d_model}")
        if self.activation_function not in ACT2FN:
            raise ValueError(
                f"activation_function: wanted one of {', '.join(ACT2FN)}, got {self.activation_function!r}"
            )
        if self.share_embeddings and not (one_vocabulary and self.tie_word_embeddings):
            raise ValueError(
                "share_embeddings: wanted one vocabulary and tie_word_embeddings=True, as source, target and output "
                f"share one matrix; got vocab_size {self.vocab_size}, encoder_vocab_size {self.encoder_vocab_size}, "
                f"tie_word_embeddings {self.tie_word_embeddings}"
            )
        super().__post_init__(**kwargs)
