"""The configuration of a recurrent encoder-decoder."""

from torch import nn
from transformers import PreTrainedConfig

__all__ = ["CELLS", "SCORES", "AttentionRNNConfig"]

CELLS = {"gru": nn.GRU, "lstm": nn.LSTM}
SCORES = ("additive", "dot", "general", "concat")


class AttentionRNNConfig(PreTrainedConfig):
    """Configuration of a recurrent encoder-decoder, with attention or without.

    Args:
        vocab_size: of the target.
        encoder_vocab_size: of the source, by default the same.
        embedding_size: of source and target.
        hidden_size: width of the decoder's and the encoder's states. Each direction of the encoder has half of it.
        num_layers: of the encoder, and of the decoder.
        cell: "gru" or "lstm".
        bidirectional: whether the encoder has two directions.
        attention: the score of a target state s against a source state h. "additive": v . tanh(W s + U h + b) (Bahdanau
            et al., 2015, appendix A). "dot": s . h, "general": s . W h, "concat": v . tanh(W [s; h]) (Luong et al.,
            2015, section 3). "none": of the source, the decoder reads only the last state.
        attention_placing: "before": from the state before the step; the context enters the cell and a maxout readout of
            state, word and context (Bahdanau). "after": from the state after the step; the readout is tanh(W [context;
            state]) (Luong). By default "before" with "additive", else "after".
        context: with attention "none". "initial": the decoder starts from the source's last state, and the vocabulary
            is scored on the decoder's states (Sutskever et al., 2014). "every_step": that state also enters the cell at
            every step and a maxout readout of state, word and context (Cho et al., 2014; peeky).
        teacher_forcing: in training with labels, the probability that an input word is the right one; otherwise it is
            the model's own last output (Bengio et al., 2015). 1 runs all steps at once where the decoder allows it.
        attention_size: width of the hidden layer of "additive" and "concat", by default hidden_size.
        input_feeding: with placing "after", the readout is part of the next step's input (Luong et al., section 3.3).
        dropout: on embeddings, between layers and on the readout.
        label_smoothing: in the loss.

    Source:
        Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2015; Luong,
        Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", 2015; Sutskever, Vinyals
        and Le, "Sequence to Sequence Learning with Neural Networks", 2014; Cho et al., "Learning Phrase Representations
        using RNN Encoder-Decoder", 2014; Bengio et al., "Scheduled Sampling for Sequence Prediction with Recurrent
        Neural Networks", 2015.

    Examples:
        >>> import transformer_fast
        >>> config = transformer_fast.AttentionRNNConfig(vocab_size=100, embedding_size=16, hidden_size=32)
        >>> model = transformer_fast.AttentionRNNForConditionalGeneration(config)
    """

    model_type = "attention_rnn"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {"num_hidden_layers": "num_layers"}

    vocab_size: int = 32000
    encoder_vocab_size: int | None = None
    embedding_size: int = 512
    hidden_size: int = 512
    num_layers: int = 1
    cell: str = "gru"
    bidirectional: bool = True
    attention: str = "additive"
    attention_size: int | None = None
    attention_placing: str | None = None
    context: str = "initial"
    teacher_forcing: float | int = 1.0
    input_feeding: bool = True
    dropout: float | int = 0.2
    label_smoothing: float | int = 0.0
    initializer_range: float = 0.05
    use_cache: bool = True
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 1

    def __post_init__(self, **kwargs):
        self.encoder_vocab_size = self.encoder_vocab_size or self.vocab_size
        self.attention_size = self.attention_size or self.hidden_size
        if self.attention_placing is None:
            self.attention_placing = "before" if self.attention == "additive" else "after"
        for name, value, wanted in (
            ("cell", self.cell, tuple(CELLS)), ("attention", self.attention, (*SCORES, "none")),
            ("attention_placing", self.attention_placing, ("before", "after")),
            ("context", self.context, ("initial", "every_step")),
        ):  # fmt: skip
            if value not in wanted:
                raise ValueError(f"{name}: wanted one of {', '.join(map(repr, wanted))}, got {value!r}")
        if self.context != "initial" and self.attention != "none":
            raise ValueError(f'context: wanted "initial" beside attention {self.attention!r}, got {self.context!r}')
        if not 0 <= self.teacher_forcing <= 1:
            raise ValueError(f"teacher_forcing: wanted a number in [0, 1], got {self.teacher_forcing!r}")
        if self.bidirectional and self.hidden_size % 2:
            raise ValueError(f"hidden_size: wanted an even number for two directions, got {self.hidden_size}")
        if self.tie_word_embeddings and self.readout_size != self.embedding_size:
            raise ValueError(
                f"tie_word_embeddings: wanted embedding_size and hidden_size equal, got {self.embedding_size} and "
                f"{self.hidden_size}"
            )
        super().__post_init__(**kwargs)

    @property
    def readout_size(self) -> int:
        """Width of the input of the projection to the vocabulary."""
        return self.embedding_size if self.has_maxout else self.hidden_size

    @property
    def has_maxout(self) -> bool:
        """Whether the readout is a maxout of state, word and context; then the context enters the cell too."""
        if self.attention == "none":
            return self.context == "every_step"
        return self.attention_placing == "before"
