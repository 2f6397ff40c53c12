"""Text features from the layers of a frozen model, for classifiers on top of them."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .layers import concat_pooling
from .models._base import ModelMixin

__all__ = ["layer_features"]

LAYERS = {"last": (-1,), "sum_last_four": (-4, -3, -2, -1), "concat_last_four": (-4, -3, -2, -1)}
POOLING = (None, "cls", "concat", "last", "max", "mean")


def layer_features(
    model: PreTrainedModel,
    texts: str | Sequence[str] | Sequence[tuple[str, str]] | Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    layers: str | int | Sequence[int] = "last",
    pooling: str | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: bool = False,
) -> torch.Tensor | list[torch.Tensor]:
    """Hidden states of chosen layers as features of texts: h_l (one layer), sum_l h_l, or [h_l1; h_l2; ...].

    Args:
        model: a text model of this package or of transformers. If it has a head, its base model is used; of an
            encoder-decoder, the encoder. It runs in eval mode and without gradients.
        texts: one text, or a list of texts, of pairs of texts, or of lists of token ids.
        tokenizer: the model's tokenizer.
        layers: "last", "sum_last_four", "concat_last_four", the index of one hidden state (0: the embeddings, -1: the
            last layer), or several indices, whose states are concatenated.
        pooling: None; "cls" (the first token), "last" (the last token), "mean" or "max" over all tokens, special tokens
            included; or "concat": [last; max; mean]. Padding is left out.
        batch_size: texts per batch. Texts are sorted by length, so that batches have little padding.
        max_length: texts are truncated to this number of tokens; default: the limit of tokenizer and model.
        progress: show a progress bar.

    Returns:
        Tensors in the model's dtype on the CPU, in the order of the texts: (N, D) with pooling, else a list of
        (tokens, D). For one text (D,) or (tokens, D). D is the model's width times the number of concatenated layers,
        and three times that with "concat".

    Raises:
        ValueError: for an unknown `layers` or `pooling`, a layer that the model does not have, or a text without
            tokens.

    Source:
        Devlin et al., "BERT", 2019, section 5.3 and table 7.

    Examples:
        >>> import transformer_fast
        >>> from transformer_fast.demo import locate  # all-MiniLM-L6-v2
        >>> tokenizer = transformer_fast.AutoTokenizer.from_pretrained(locate())
        >>> model = transformer_fast.AutoModel.from_pretrained(locate())
        >>> transformer_fast.layer_features(model, ["One text.", "Another."], tokenizer, pooling="mean").shape
        torch.Size([2, 384])
    """
    if isinstance(texts, str):
        options: dict = {"layers": layers, "pooling": pooling, "max_length": max_length, "progress": progress}
        return layer_features(model, [texts], tokenizer, **options)[0]
    base = _base(model)
    depth = base.config.num_hidden_layers
    indices, combine = _layers(layers)
    if pooling not in POOLING:
        raise ValueError(f"pooling: wanted one of {', '.join(map(repr, POOLING))}, got {pooling!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: wanted at least 1, got {batch_size}")
    rows = _tokens(texts, tokenizer, _max_length(base, tokenizer, max_length))
    found: list[Any] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), tqdm(total=len(rows), desc="features", disable=not progress) as bar:
            for at in range(0, len(order), batch_size):
                batch = order[at : at + batch_size]
                states, mask = _states(base, tokenizer, [rows[i] for i in batch], indices, combine, depth)
                for i, feature in zip(batch, _pool(states, mask, pooling)):
                    found[i] = feature.cpu()
                bar.update(len(batch))
    finally:
        model.train(training)
    if pooling is None:
        return found
    width = base.config.hidden_size * (len(indices) if combine == "concat" else 1) * (3 if pooling == "concat" else 1)
    return torch.stack(found) if found else torch.empty(0, width, dtype=base.dtype)


def _base(model: PreTrainedModel) -> Any:
    base: Any = model.base_model
    return base.get_encoder() if base.config.is_encoder_decoder else base


def _layers(layers) -> tuple[tuple[int, ...], str]:
    if isinstance(layers, str):
        if layers not in LAYERS:
            raise ValueError(f"layers: wanted {', '.join(LAYERS)}, an index or indices, got {layers!r}")
        return LAYERS[layers], layers.split("_")[0]
    indices = (layers,) if isinstance(layers, int) else tuple(layers)
    if not indices:
        raise ValueError("layers: wanted at least one index, got none")
    return indices, "concat"


def _max_length(base, tokenizer, asked: int | None) -> int | None:
    """The maximum length, or None. Tokenizers without a limit have a huge model_max_length; models with relative
    positions have no max_position_embeddings."""
    limits = [asked, tokenizer.model_max_length, getattr(base.config, "max_position_embeddings", None)]
    known = [n for n in limits if n is not None and n < 10**9]
    return min(known) if known else None


def _tokens(texts, tokenizer, longest: int | None) -> list[dict]:
    if len(texts) and not isinstance(texts[0], (str, tuple)) and not any(isinstance(x, str) for x in texts[0][:1]):
        rows = [{"input_ids": list(ids)[:longest]} for ids in texts]
    else:
        pairs = len(texts) > 0 and not isinstance(texts[0], str)
        given = ([t[0] for t in texts], [t[1] for t in texts]) if pairs else (list(texts),)
        encoded = tokenizer(*given, truncation=longest is not None, max_length=longest) if len(texts) else {}
        names = [n for n in ("input_ids", "token_type_ids") if n in encoded]
        rows = [{n: encoded[n][i] for n in names} for i in range(len(texts))]
    for i, row in enumerate(rows):
        if not row["input_ids"]:
            raise ValueError(f"texts: number {i} has no tokens")
    return rows


def _states(base, tokenizer, rows, indices, combine, depth) -> tuple[torch.Tensor, torch.Tensor]:
    """The combined states (B, S, D), and the mask (B, S) of tokens."""
    longest = max(len(row["input_ids"]) for row in rows)
    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows])
    inputs = {"attention_mask": mask}
    for name in rows[0]:
        fill: Any = (tokenizer.pad_token_id or 0) if name == "input_ids" else 0
        if isinstance(rows[0][name][0], (list, tuple)):  # ELMo's words are lists of characters
            fill = [fill] * len(rows[0][name][0])
        inputs[name] = torch.tensor([list(r[name]) + [fill] * (longest - len(r[name])) for r in rows])
    inputs = {name: t.to(base.device) for name, t in inputs.items()}
    if indices == (-1,):
        return base(**inputs).last_hidden_state, inputs["attention_mask"]
    # Models of this package store only the states that are requested.
    chosen = sorted({i % (depth + 1) for i in indices}) if isinstance(base, ModelMixin) else True
    states = base(**inputs, output_hidden_states=chosen).hidden_states
    if any(not -len(states) <= i < len(states) for i in indices):
        raise ValueError(f"layers: the model has hidden states {-len(states)}..{len(states) - 1}, got {list(indices)}")
    kept = [states[i] for i in indices]
    return (torch.cat(kept, -1) if combine == "concat" else sum(kept[1:], kept[0])), inputs["attention_mask"]


def _pool(states: torch.Tensor, mask: torch.Tensor, pooling: str | None):
    """One feature per row of states (B, S, D); padding is on the right."""
    lengths = mask.sum(1)
    if pooling is None:
        return [row[:n] for row, n in zip(states, lengths.tolist())]
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), lengths - 1]
    if pooling == "concat":
        return concat_pooling(states, mask)
    padding = (mask == 0)[..., None]
    if pooling == "max":
        return states.masked_fill(padding, -torch.inf).amax(1)
    return (states.float().masked_fill(padding, 0).sum(1) / lengths[:, None]).to(states.dtype)
