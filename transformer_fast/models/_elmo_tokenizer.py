"""ELMo's tokenizer: words as sequences of bytes."""

import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchEncoding

__all__ = ["BEHIND", "ElmoTokenizer"]

_BEGIN_SENTENCE, _END_SENTENCE, _BEGIN_WORD, _END_WORD, _BEHIND = 256, 257, 258, 259, 260
BEHIND = _BEHIND + 1  # as an id: ids are one more than characters, 0 is padding
_FILE = "elmo_tokenizer.json"


class ElmoTokenizer:
    """Texts as words, and words as the ids of their bytes: 1 + byte, marks around them, as AllenNLP's batch_to_ids.

    A text is split at white space, and punctuation marks are words of their own. Pass lists of words to split them
    otherwise; the published model was trained on Penn Treebank tokens. Longer words are cut to C - 2 bytes. No
    vocabulary is needed, and no word is unknown.

    Args:
        max_characters_per_token: C, of which two are the marks.
        model_max_length: number of words that are kept of a text with truncation=True.

    Source:
        Peters et al., "Deep contextualized word representations", 2018, section 3.4.

    Examples:
        >>> import transformer_fast
        >>> tokenizer = transformer_fast.ElmoTokenizer()
        >>> tokenizer.tokenize("It isn't far.")
        ['It', "isn't", 'far', '.']
        >>> tokenizer(["It isn't far.", "So?"], padding=True, return_tensors="pt")["input_ids"].shape
        torch.Size([2, 4, 50])
    """

    pad_token_id = 0
    padding_side = "right"
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, max_characters_per_token: int = 50, model_max_length: int = 10**30):
        for name, value, least in (
            ("max_characters_per_token", max_characters_per_token, 3), ("model_max_length", model_max_length, 1),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: wanted an integer, at least {least}, got {value!r}")
        self.max_characters_per_token, self.model_max_length = max_characters_per_token, model_max_length

    @property
    def bounds(self) -> tuple[list[int], list[int]]:
        """The characters of the begin-of-sentence and end-of-sentence marks."""
        return self._framed([_BEGIN_SENTENCE]), self._framed([_END_SENTENCE])

    def _framed(self, characters: Sequence[int]) -> list[int]:
        size = self.max_characters_per_token
        row = [_BEGIN_WORD, *characters[: size - 2], _END_WORD, *[_BEHIND] * size]
        return [n + 1 for n in row[:size]]

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return re.findall(r"\w+(?:['’-]\w+)*|[^\w\s]", text)

    def encode_word(self, word: str) -> list[int]:
        """(C,) ids of a word's bytes. ValueError for an empty word."""
        characters = list(word.encode("utf-8", "ignore"))
        if not characters:
            raise ValueError(f"words: wanted at least one character in each, got {word!r}")
        return self._framed(characters)

    def __call__(
        self,
        text: str | Sequence[str] | Sequence[Sequence[str]],
        *,
        is_split_into_words: bool = False,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchEncoding:
        """text: one text or several; with is_split_into_words one list of words or several. padding: True or "longest",
        or "max_length". Returns input_ids (C ids per word, zeros for padding) and attention_mask, as lists or, with
        return_tensors="pt", as tensors (B, S, C) and (B, S)."""
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors: wanted None or 'pt', got {return_tensors!r}")
        single = isinstance(text, str) or (is_split_into_words and bool(text) and isinstance(text[0], str))
        texts: Any = [text] if single else list(text)
        rows = [self._words(item, is_split_into_words) for item in texts]
        limit = max_length or self.model_max_length
        if truncation:
            rows = [row[:limit] for row in rows]
        encoded: dict[str, list] = {"input_ids": [[self.encode_word(word) for word in row] for row in rows]}
        encoded["attention_mask"] = [[1] * len(row) for row in rows]
        if padding:
            encoded = dict(self.pad(encoded, padding, max_length))
        if return_tensors == "pt":
            if len({len(row) for row in encoded["input_ids"]}) > 1:
                raise ValueError("padding: wanted True for texts of different lengths as tensors, got False")
            ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
            return BatchEncoding({
                "input_ids": ids.view(len(rows), -1, self.max_characters_per_token) if ids.numel() else
                ids.new_zeros(len(rows), 0, self.max_characters_per_token),
                "attention_mask": torch.tensor(encoded["attention_mask"], dtype=torch.int64),
            })  # fmt: skip
        return BatchEncoding({name: rows[0] for name, rows in encoded.items()} if single else encoded)

    def _words(self, item: Any, split: bool) -> list[str]:
        if split:
            if isinstance(item, str) or not all(isinstance(word, str) for word in item):
                raise TypeError("text: wanted lists of words with is_split_into_words=True")
            return list(item)
        if not isinstance(item, str):
            raise TypeError(f"text: wanted a text or a list of texts, got {type(item).__name__} in it")
        return self.tokenize(item)

    def pad(self, encoded, padding: bool | str = True, max_length: int | None = None, return_tensors=None, **kwargs):
        """Pad the rows of input_ids and attention_mask to the longest one, or to max_length with padding="max_length".
        encoded: a dict of rows, or a list of single rows as collators pass it. Other keys are kept."""
        if isinstance(encoded, (list, tuple)):
            encoded = {name: [row[name] for row in encoded] for name in encoded[0]}
        ids = [list(row) for row in encoded["input_ids"]]
        longest = max((len(row) for row in ids), default=0)
        if padding == "max_length":
            if max_length is None:
                raise ValueError("max_length: wanted a number with padding='max_length', got None")
            longest = max(longest, max_length)
        filled: dict[str, Any] = dict(encoded)
        nothing = [0] * self.max_characters_per_token
        filled["input_ids"] = [row + [nothing] * (longest - len(row)) for row in ids]
        filled["attention_mask"] = [[1] * len(row) + [0] * (longest - len(row)) for row in ids]
        if return_tensors == "pt":
            filled = {name: torch.tensor(rows) for name, rows in filled.items()}
        return BatchEncoding(filled)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> tuple[str]:
        """Write elmo_tokenizer.json into the folder."""
        folder = pathlib.Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        names = ("max_characters_per_token", "model_max_length")
        (folder / _FILE).write_text(json.dumps({name: getattr(self, name) for name in names}, indent=2) + "\n")
        return (str(folder / _FILE),)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **kwargs) -> "ElmoTokenizer":
        """Load from a folder that save_pretrained wrote; for a model's folder without one, from its config.json."""
        for name in (_FILE, "config.json"):
            file = pathlib.Path(folder) / name
            if file.is_file():
                found = json.loads(file.read_text(encoding="utf-8"))
                names = ("max_characters_per_token", "model_max_length")
                return cls(**{**{n: found[n] for n in names if n in found}, **kwargs})
        raise FileNotFoundError(f"{folder}: has neither {_FILE} nor config.json")
