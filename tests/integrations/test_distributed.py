"""Data parallel and fully sharded training of each family: two processes get the gradients that one gets on both halves
of a batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from compat_families import BATCH, make_config, make_inputs
from numerics import GRADIENT, assert_as_accurate, pooled
from torch import nn

import transformer_fast as tf
from transformer_fast.models._layer import Layer

WORLD = 2
_DECODER = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
DECODERS = {
    "LlamaForCausalLM": ("LlamaConfig", {}),
    "MistralForCausalLM": ("MistralConfig", {"sliding_window": 4}),
    "Qwen2ForCausalLM": ("Qwen2Config", {}),
    "Qwen3ForCausalLM": ("Qwen3Config", {"head_dim": 8}),
    "Gemma2ForCausalLM": ("Gemma2Config", {"head_dim": 8, "sliding_window": 4}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {}),
    "PhiForCausalLM": ("PhiConfig", {}),
    "OPTForCausalLM": ("OPTConfig", {"ffn_dim": 48, "dropout": 0.0}),
    "GPTNeoForCausalLM": (
        "GPTNeoConfig",
        {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
}
IDS = {"vocab_size": 61, "pad_token_id": 0, "decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}
OURS = {
    "TransformerForConditionalGeneration": ("TransformerConfig", {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
        "dropout": 0.0,
    }),
    "AttentionRNNForConditionalGeneration": ("AttentionRNNConfig", {
        "embedding_size": 16, "hidden_size": 32, "dropout": 0.0,
    }),
}  # fmt: skip
FAMILIES = [
    "BertForSequenceClassification", "DistilBertForMaskedLM", "AlbertForMaskedLM", "RobertaForMaskedLM",
    "ElectraForMaskedLM", "MPNetForMaskedLM", "ModernBertForMaskedLM", "GPT2LMHeadModel", "OpenAIGPTLMHeadModel",
    "BartForConditionalGeneration", "MarianMTModel", "T5ForConditionalGeneration", *DECODERS, *OURS,
]  # fmt: skip


def make_model(name: str):
    torch.manual_seed(0)
    if name in DECODERS:
        config_class, settings = DECODERS[name]
        return getattr(tf, name)(getattr(transformers, config_class)(**_DECODER | settings)).train()
    if name in OURS:
        config_class, settings = OURS[name]
        return getattr(tf, name)(getattr(tf, config_class)(**IDS | settings)).train()
    return getattr(tf, name)(make_config(name)).train()


def batch(name: str, rank: int) -> dict:
    """This process's rows of one batch with padding."""
    like = "GPT2LMHeadModel" if name in DECODERS else "BartForConditionalGeneration" if name in OURS else name
    inputs = make_inputs(like)
    rows = slice(rank * BATCH // WORLD, (rank + 1) * BATCH // WORLD)
    return {key: value[rows] for key, value in inputs.items()}


def one_process(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = make_model(name).to(dtype)
    sum(model(**batch(name, rank)).loss for rank in range(WORLD)).div(WORLD).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def data_parallel(name: str, rank: int) -> dict[str, torch.Tensor]:
    model = nn.parallel.DistributedDataParallel(make_model(name), find_unused_parameters=True)
    model(**batch(name, rank)).loss.backward()
    return {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}


def fully_sharded(name: str, rank: int) -> dict[str, torch.Tensor]:
    """Each layer, then the model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, model = init_device_mesh("cpu", (WORLD,)), make_model(name)
    for module in [m for m in model.modules() if isinstance(m, Layer)]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(**batch(name, rank)).loss.backward()
    return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}


WAYS = {"data parallel": data_parallel, "fully sharded": fully_sharded}


def work(rank: int, rendezvous: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    found = {}
    for name in FAMILIES:
        for way, run in WAYS.items():
            try:
                found[name, way] = run(name, rank)
            except Exception as error:  # in both of them
                found[name, way] = f"{type(error).__name__}: {error}"
    if rank == 0:
        torch.save(found, result)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch was built without torch.distributed's gloo backend")
    folder = tmp_path_factory.mktemp("gradients")
    mp.spawn(work, (str(folder / "rendezvous"), str(folder / "found.pt")), nprocs=WORLD)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients(found, name):
    alone, truth = one_process(name, torch.float32), one_process(name, torch.float64)
    for way in WAYS:
        gradients = found[name, way]
        assert not isinstance(gradients, str), f"{way}: {gradients}"
        assert gradients.keys() == alone.keys(), way
        assert_as_accurate(*(pooled(g, truth) for g in (gradients, truth, alone)), GRADIENT, name=way)
