"""Diverse beam search, which transformers 5 removed, compared with a simple implementation per prompt in this file."""

import pytest
import torch
from generating_models import models, prompts, seq2seq_models
from hypothesis import given, settings
from hypothesis import strategies as st

END, PAD = 1, 2


def next_log_probs(model, kwargs, sequences):
    """Log-probabilities (n, V) after n sequences of one prompt, without a cache."""
    if model.config.is_encoder_decoder:
        given = {k: v.expand(len(sequences), -1) for k, v in kwargs.items()}
        logits = model(**given, decoder_input_ids=sequences).logits
    else:
        mask = torch.nn.functional.pad(
            kwargs["attention_mask"], (0, sequences.shape[1] - kwargs["attention_mask"].shape[1]), value=1
        ).expand(len(sequences), -1)
        logits = model(sequences, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    return logits[:, -1].log_softmax(-1)


def search(model, kwargs, start, beams, groups, strength, tokens, penalty, early):
    """The finished hypotheses (score, tokens) of one prompt, best first, computed with lists and loops."""
    per_group = beams // groups
    running = [[(0.0, start)] for _ in range(groups)]
    ended = [[] for _ in range(groups)]
    over = [False] * groups
    for step in range(1, tokens + 1):
        used: dict[int, int] = {}
        for g in range(groups):
            if over[g]:
                continue
            log_probs = next_log_probs(model, kwargs, torch.stack([ids for _, ids in running[g]]))
            for token, count in used.items():
                log_probs[:, token] -= strength * count
            every = [
                (score + float(p), torch.cat([ids, torch.tensor([token])]))
                for (score, ids), row in zip(running[g], log_probs)
                for token, p in enumerate(row)
            ]
            best = sorted(every, key=lambda x: -x[0])[: 2 * per_group]
            running[g] = []
            for rank, (score, ids) in enumerate(best):
                ends = int(ids[-1]) == END or step == tokens
                if ends and rank < per_group:
                    ended[g] = sorted([*ended[g], (score / step**penalty, ids)], key=lambda x: -x[0])[:per_group]
                elif not ends and len(running[g]) < per_group:
                    running[g].append((score, ids))
            for _, ids in running[g] or best[:per_group]:
                used[int(ids[-1])] = used.get(int(ids[-1]), 0) + 1
            full = len(ended[g]) == per_group
            length = tokens if early == "never" and penalty > 0 else step
            hopeless = full and running[g] and running[g][0][0] / length**penalty <= ended[g][-1][0]
            over[g] = bool(full and (early is True or hopeless)) or step == tokens
    return sorted((h for group in ended for h in group), key=lambda x: -x[0])


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_as_written_out(family):
    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(st.data())
    def property(data):
        seed = data.draw(st.integers(0, 99))
        _, model = models(seed) if family == "gpt2" else seq2seq_models(family, seed)
        model.double()
        groups = data.draw(st.integers(2, 3))
        beams = groups * data.draw(st.integers(1, 2))
        options = {
            "num_beams": beams, "num_beam_groups": groups, "diversity_penalty": data.draw(st.sampled_from([0.4, 3.0])),
            "length_penalty": data.draw(st.sampled_from([0.0, 1.0, -0.5])), "max_new_tokens": 6,
            "early_stopping": data.draw(st.sampled_from([False, True, "never"])),
        }  # fmt: skip
        if family == "bart":
            model.generation_config.forced_eos_token_id = None
        ids, mask = prompts(2, 5, "left" if family == "gpt2" else "right")
        n = data.draw(st.integers(1, beams))
        found = model.generate(
            ids, attention_mask=mask, num_return_sequences=n, return_dict_in_generate=True, output_scores=True,
            do_sample=False, **options,
        )  # fmt: skip
        for b in range(2):
            kwargs = {"attention_mask": mask[b : b + 1]}
            if family == "bart":
                kwargs["input_ids"] = ids[b : b + 1]
            start = ids[b] if family == "gpt2" else torch.tensor([PAD])
            with torch.no_grad():
                wanted = search(
                    model, kwargs, start, beams, groups, options["diversity_penalty"], 6, options["length_penalty"],
                    options["early_stopping"],
                )  # fmt: skip
            for i in range(n):
                score, sequence = wanted[i]
                row = found.sequences[b * n + i]
                assert row[: len(sequence)].tolist() == sequence.tolist()
                assert (row[len(sequence) :] == PAD).all()
                assert abs(float(found.sequences_scores[b * n + i]) - score) < 1e-4

    property()


@pytest.mark.quick
def test_first_group_is_a_plain_search_and_the_others_differ():
    _, model = models(3)
    ids, mask = prompts(3, 6, "left")
    kwargs = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids, num_beams=2, **kwargs)
    found = model.generate(
        ids, num_beams=6, num_beam_groups=3, diversity_penalty=50.0, num_return_sequences=6, **kwargs
    )
    width = max(plain.shape[1], found.shape[1])
    plain, found = (torch.nn.functional.pad(t, (0, width - t.shape[1]), value=PAD) for t in (plain, found))
    for b in range(3):
        assert plain[b].tolist() in found[6 * b : 6 * b + 6].tolist()
        assert len(set(found[6 * b : 6 * b + 6, ids.shape[1]].tolist())) >= 3  # first tokens


@pytest.mark.quick
@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 4, "num_beam_groups": 3}, "num_beam_groups: wanted a divisor of num_beams = 4, got 3"),
        ({"num_beams": 4, "num_beam_groups": 0}, "num_beam_groups: wanted at least 1, got 0"),
        ({"diversity_penalty": None}, "diversity_penalty: wanted a number over 0"),
        ({"diversity_penalty": 0.0}, "diversity_penalty: wanted a number over 0"),
        ({"do_sample": True}, "do_sample: wanted False"),
        ({"streamer": object()}, "streamer: wanted None"),
        ({"use_cache": False}, "num_beam_groups: can only be used with the cache"),
    ],
)
def test_bad_input(options, message):
    _, model = models()
    options = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": False} | options
    with pytest.raises(ValueError, match=message):
        model.generate(torch.ones(1, 3, dtype=torch.long), **options)
