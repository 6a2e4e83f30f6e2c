"""Tokens of a chunk in one pass, against the same sequence built by hand and read by transformers' own model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from configs.loader import RecipeError, load_recipe
from configs.policy import PolicyPart
from policies.openvla.checkpoint import open_openvla
from policies.parallel import ParallelPolicy
from policies.published import LLAMA_STOP_ID, PublishedError, check_published, published_policy
from tests import openvla_tiny
from tests.paradigms import new, observations

KEY = openvla_tiny.KEY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return openvla_tiny.write_checkpoint(tmp_path_factory.mktemp("oft") / "checkpoint")


def part(folder: Path, **changes: object) -> PolicyPart:
    given = {"checkpoint": str(folder), "unnorm_key": KEY, "decoding": "parallel", "chunk": 2}
    return PolicyPart.model_validate(given | changes)


def test_a_checkpoint_is_read_as_openvla_oft_reads_it(folder: Path) -> None:
    policy = published_policy(part(folder), device=torch.device("cpu"))
    assert isinstance(policy, ParallelPolicy)
    seen = openvla_tiny.observations(3)
    samples = policy.act(seen, seeds=[0, 0, 0], temperature=0.0)
    prompts, network = open_openvla(folder).prompts, policy.network
    model, first = network.language_model.model, network.action_first_id
    for observation, sample in zip(seen, samples, strict=True):
        batch = policy.batch([observation], [sample.model_chunk])
        ids = torch.tensor([prompts.encode(observation.instruction)])
        with torch.no_grad():
            text = model.embed_tokens(ids)
            images = network.encode_images(batch.agentview_BHWC, batch.wrist_BHWC)
            places = torch.zeros(1, policy.tokens, text.shape[-1])
            stop = model.embed_tokens(torch.tensor([[LLAMA_STOP_ID]]))
            sequence = torch.cat([text[:, :1], images, text[:, 1:], places, stop], dim=1)
            length = sequence.shape[1]
            everything = torch.zeros(
                1, 1, length, length
            )  # added to the attention's scores: nothing is hidden
            hidden = model(inputs_embeds=sequence, attention_mask=everything).last_hidden_state
            before = images.shape[1] + ids.shape[1] - 1
            logits = network.language_model.lm_head(hidden[0, before : before + policy.tokens])
        logits = logits[:, first : network.action_stop_id]
        assert sample.model_chunk.tolist() == (logits.argmax(dim=-1) + first).tolist()
        expected = torch.log_softmax(logits, dim=-1).max(dim=-1).values
        np.testing.assert_allclose(sample.logps, expected.numpy(), atol=1e-4)


def test_no_token_sees_what_another_came_to_be() -> None:
    policy = new("parallel")
    (seen,) = observations(1)
    (sample,) = policy.act([seen], seeds=[3], temperature=1.0)
    other = sample.model_chunk.copy()
    other[4] = sample.model_chunk.min() if other[4] != sample.model_chunk.min() else sample.model_chunk.max()
    assert other[4] != sample.model_chunk[4]
    with torch.no_grad():
        one, two = policy.score(policy.batch([seen, seen], [sample.model_chunk, other]))
    np.testing.assert_allclose(one, sample.logps, atol=1e-5)
    unlike = (one != two).nonzero().flatten().tolist()
    assert unlike == [4]


def test_draws_follow_the_distribution_that_is_scored() -> None:
    policy = new("parallel")
    (seen,) = observations(1)
    draws = 400
    samples = policy.act([seen] * draws, seeds=range(draws), temperature=1.0)
    first = np.array([sample.model_chunk[0] for sample in samples])
    ids = np.unique(first)
    chunks = []
    for token in ids:
        chunk = samples[0].model_chunk.copy()
        chunk[0] = token
        chunks.append(chunk)
    with torch.no_grad():
        expected = policy.score(policy.batch([seen] * len(ids), chunks))[:, 0].exp().numpy()
    found = np.array([(first == token).mean() for token in ids])
    assert expected.sum() > 0.95  # hardly a bin was never drawn
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / draws)


def test_its_checkpoint_decides_chunks_and_another_one_action(folder: Path) -> None:
    assert check_published(part(folder), image_size=48) > 0
    with pytest.raises(
        PublishedError, match=r"set policy.chunk=1, or policy.decoding=parallel for OpenVLA-OFT's"
    ):
        check_published(part(folder, decoding="sequential"), image_size=48)


def test_what_cannot_decode_in_parallel_is_refused() -> None:
    recipe = Path("configs/openvla_oft_libero.yaml")
    assert load_recipe(recipe).policy.decoding == "parallel"
    with pytest.raises(RecipeError, match=r"policy.decoding=parallel does not; set serving.engine=torch"):
        load_recipe(recipe, ["serving.engine=vllm"])
    with pytest.raises(RecipeError, match=r"policy.decoding means nothing to paradigm flow"):
        load_recipe(Path("configs/tiny_pi05.yaml"), ["policy.decoding=parallel"])
