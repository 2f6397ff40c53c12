"""Fixtures: a Ray instance with two cores, the examples as modules, a tiny BERT with a tokenizer."""

import importlib.util
import os
import pathlib
import sys

import pytest
import torch
import transformers
from tokenizers import BertWordPieceTokenizer

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
WORDS = """the a cat dog sat ran on mat over fence house tree
and then came back home again very slowly""".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def local_ray():
    """Ray pickles the classes of a script by value; register_pickle_by_value does so for a module."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install 'transformer-fast[ray]'")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "TRANSFORMER_FAST_POISON": "1"}
    import ray

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, logging_level="warning")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def example(local_ray):
    """An example as a module, by its name."""
    from ray import cloudpickle

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        cloudpickle.register_pickle_by_value(module)
        return module

    return load


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    made = BertWordPieceTokenizer()
    made.train_from_iterator([" ".join(WORDS)] * 3, vocab_size=120, min_frequency=1, show_progress=False)
    made.save(str(folder / "tokenizer.json"))
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in names.items()},
    )  # fmt: skip


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tokenizer):
    """Folders of tiny random models: {"embed", "classify", "summarize", "generate"}."""
    torch.manual_seed(0)
    hf = transformers
    size = len(tokenizer)
    marks = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.sep_token_id}
    bert = hf.BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2, id2label={0: "calm", 1: "wild"},
    )  # fmt: skip
    bart = hf.BartConfig(
        vocab_size=size, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, init_std=0.3,
        bos_token_id=tokenizer.cls_token_id, decoder_start_token_id=tokenizer.sep_token_id, forced_eos_token_id=None,
        **marks,
    )  # fmt: skip
    gpt = hf.GPT2Config(
        vocab_size=size, n_embd=32, n_layer=1, n_head=2, n_positions=64, initializer_range=0.2,
        bos_token_id=tokenizer.cls_token_id, **marks,
    )  # fmt: skip
    models = {
        "embed": hf.BertModel(bert),
        "classify": hf.BertForSequenceClassification(bert),
        "summarize": hf.BartForConditionalGeneration(bart),
        "generate": hf.GPT2LMHeadModel(gpt),
    }
    folders = {}
    for name, model in models.items():
        folders[name] = tmp_path_factory.mktemp("checkpoints") / name
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def texts():
    """40 texts of 1 to 30 words."""
    drawn = torch.Generator().manual_seed(3)
    draw = lambda n: torch.randint(n, (1,), generator=drawn).item()  # noqa: E731
    return [" ".join(WORDS[draw(len(WORDS))] for _ in range(1 + draw(30))) for _ in range(40)]
