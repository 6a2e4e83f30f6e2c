"""From a recipe's policy part to a policy."""

from __future__ import annotations

import torch

from configs.policy import PolicyPart
from policies.action_tokens import ActionTokenizer
from policies.autoregressive import AutoregressivePolicy
from policies.openvla import OpenVLA, llama
from policies.protocol import Policy
from policies.text import PromptTokenizer
from policies.vision import SiglipTower, VisionBackbone


def make_policy(part: PolicyPart, *, image_size: int, seed: int, device: torch.device) -> Policy:
    """A policy with random weights fixed by `seed` (torch's own generator is left as it was).

    Raises ValueError naming the setting when sizes do not fit together.
    """
    match part.paradigm:
        case "autoregressive":
            return make_autoregressive(part, image_size=image_size, seed=seed, device=device)


def make_autoregressive(
    part: PolicyPart, *, image_size: int, seed: int, device: torch.device
) -> AutoregressivePolicy:
    """The token policy of `part`; see `make_policy`."""
    prompts = PromptTokenizer()
    vocab_size = prompts.size + part.bins
    actions = ActionTokenizer(vocab_size=vocab_size, bins=part.bins)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = OpenVLA(
            vision_backbone=VisionBackbone([SiglipTower(part.vision, image_size)], part.vision.merge),
            language_model=llama(
                part.decoder, vocab_size=vocab_size, bos_id=prompts.bos_id, pad_id=prompts.pad_id
            ),
            action_first_id=actions.first_id,
            action_stop_id=actions.stop_id,
        )
    return AutoregressivePolicy(
        network.to(device), prompts=prompts, actions=actions, chunk=part.chunk, image_size=image_size
    )
