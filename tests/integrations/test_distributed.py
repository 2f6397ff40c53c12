"""Data parallel and fully sharded training: two processes get the gradients that one gets on both halves of a batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from numerics import GRADIENT, assert_as_accurate, pooled
from torch import nn

import transformer_fast as tf

WORLD = 2


def make_model():
    from transformers import BertConfig

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=32,
    )  # fmt: skip
    return tf.BertForSequenceClassification(config).train()


def batch(rank: int) -> dict:
    generator = torch.Generator().manual_seed(rank)
    lengths = torch.randint(3, 17, (4, 1), generator=generator)
    return {
        "input_ids": torch.randint(1, 99, (4, 16), generator=generator),
        "attention_mask": (torch.arange(16) < lengths).long(),
        "labels": torch.randint(0, 2, (4,), generator=generator),
    }


def one_process(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = make_model().to(dtype)
    sum(model(**batch(rank)).loss for rank in range(WORLD)).div(WORLD).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def data_parallel(rank: int) -> dict[str, torch.Tensor]:
    model = nn.parallel.DistributedDataParallel(make_model())
    model(**batch(rank)).loss.backward()
    return {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}


def fully_sharded(rank: int) -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, model = init_device_mesh("cpu", (WORLD,)), make_model()
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(**batch(rank)).loss.backward()
    return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}


def work(rank: int, how, rendezvous: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    found = how(rank)
    if rank == 0:
        torch.save(found, result)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("how", [data_parallel, fully_sharded], ids=lambda f: f.__name__)
def test_gradients(how, tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch was built without torch.distributed's gloo backend")
    result = tmp_path / "gradients.pt"
    mp.spawn(work, (how, str(tmp_path / "rendezvous"), str(result)), nprocs=WORLD)
    found, alone, truth = torch.load(result), one_process(torch.float32), one_process(torch.float64)
    assert found.keys() == alone.keys()
    assert_as_accurate(*(pooled(g, truth) for g in (found, truth, alone)), GRADIENT)
