"""From a recipe's policy part to a policy."""

from __future__ import annotations

import torch

from configs.policy import PolicyPart
from policies.autoregressive import AutoregressivePolicy
from policies.diffusion import DiffusionPolicy
from policies.encoding.action_tokens import ActionTokenizer
from policies.encoding.prompts import PromptTokenizer
from policies.flow import FlowPolicy
from policies.openvla.inputs import OpenVLAInputs
from policies.openvla.network import OpenVLA, llama
from policies.openvla.vision import SiglipTower, VisionBackbone
from policies.parallel import ParallelPolicy
from policies.pi0.inputs import PlainInputs
from policies.pi0.network import Pi0Network
from policies.pi0.preprocessing import STATE_BINS
from policies.pi0.sizes import Pi0Config, StreamSize, VisionSize
from policies.protocol import Policy
from policies.published import published_policy
from trajectories.records import PROPRIO_DIM


def make_policy(
    part: PolicyPart, *, image_size: int, seed: int, device: torch.device, filled: bool = True
) -> Policy:
    """The policy of `part.checkpoint`, or one with random weights fixed by `seed` (torch's own generator is left as it
    was). With a checkpoint `image_size`, of LIBERO's cameras, may be any (`check_published` refuses small ones); not
    `filled`, its weights are not read, for a snapshot will fill them.

    Raises ValueError naming the setting when sizes do not fit together, and PublishedError for a checkpoint that does
    not do.
    """
    if part.checkpoint is not None:
        return published_policy(part, device=device, filled=filled)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        match part.paradigm:
            case "autoregressive" if part.decoding == "parallel":
                return make_parallel(part, image_size=image_size, device=device)
            case "autoregressive":
                return make_autoregressive(part, image_size=image_size, device=device)
            case "flow":
                return make_flow(part, image_size=image_size, device=device)
            case "diffusion":
                return make_diffusion(part, image_size=image_size, device=device)


def make_autoregressive(part: PolicyPart, *, image_size: int, device: torch.device) -> AutoregressivePolicy:
    """The token policy of `part`, with weights from torch's current generator."""
    prompts = PromptTokenizer()
    actions = ActionTokenizer(vocab_size=prompts.size + part.bins, bins=part.bins)
    network = _openvla(part, prompts, actions, vocab_size=actions.stop_id, image_size=image_size)
    inputs = OpenVLAInputs(prompts=prompts, actions=actions, chunk=part.chunk, image_size=image_size)
    return AutoregressivePolicy(network.to(device), inputs=inputs)


def make_parallel(part: PolicyPart, *, image_size: int, device: torch.device) -> ParallelPolicy:
    """The parallel token policy of `part`: the token policy's network with one more word, which ends a chunk."""
    prompts = PromptTokenizer()
    actions = ActionTokenizer(vocab_size=prompts.size + part.bins, bins=part.bins)
    network = _openvla(part, prompts, actions, vocab_size=actions.stop_id + 1, image_size=image_size)
    inputs = OpenVLAInputs(prompts=prompts, actions=actions, chunk=part.chunk, image_size=image_size)
    return ParallelPolicy(network.to(device), inputs=inputs, stop_token_id=actions.stop_id)


def make_diffusion(part: PolicyPart, *, image_size: int, device: torch.device) -> DiffusionPolicy:
    """The discrete-diffusion policy of `part`: the token policy's network with one more word, [MASK]."""
    prompts = PromptTokenizer()
    actions = ActionTokenizer(vocab_size=prompts.size + part.bins, bins=part.bins)
    network = _openvla(part, prompts, actions, vocab_size=actions.stop_id + 1, image_size=image_size)
    inputs = OpenVLAInputs(prompts=prompts, actions=actions, chunk=part.chunk, image_size=image_size)
    return DiffusionPolicy(network.to(device), inputs=inputs, part=part.diffusion)


def make_flow(part: PolicyPart, *, image_size: int, device: torch.device) -> FlowPolicy:
    """The flow-matching policy of `part`."""
    prompts, vision, decoder = PromptTokenizer(), part.vision, part.decoder
    if decoder.width % decoder.heads:
        raise ValueError(f"decoder.width {decoder.width} is no multiple of decoder.heads {decoder.heads}")
    heads = {"heads": decoder.heads, "kv_heads": decoder.heads, "head_dim": decoder.width // decoder.heads}
    config = Pi0Config(
        adaptive=part.flow.version == "pi0.5",
        vision=VisionSize(
            width=vision.width,
            depth=vision.layers,
            mlp=vision.mlp,
            heads=vision.heads,
            image=image_size,
            patch=vision.patch,
        ),
        vlm=StreamSize(width=decoder.width, depth=decoder.layers, mlp=decoder.mlp, **heads),
        expert=StreamSize(
            width=part.flow.expert_width, depth=decoder.layers, mlp=part.flow.expert_mlp, **heads
        ),
        vocab=prompts.size + STATE_BINS,
        horizon=part.chunk,
        action_dim=PROPRIO_DIM,
        state_dim=PROPRIO_DIM,
    )
    network = Pi0Network(config).to(device).eval()
    inputs = PlainInputs(
        prompts,
        image_size=image_size,
        adaptive=config.adaptive,
        state_in_prompt=part.flow.state_in_prompt,
    )
    return FlowPolicy(network, inputs=inputs, part=part.flow, chunk=part.chunk)


def _openvla(
    part: PolicyPart, prompts: PromptTokenizer, actions: ActionTokenizer, *, vocab_size: int, image_size: int
) -> OpenVLA:
    return OpenVLA(
        vision_backbone=VisionBackbone([SiglipTower(part.vision, image_size)], part.vision.merge),
        language_model=llama(
            part.decoder, vocab_size=vocab_size, bos_id=prompts.bos_id, pad_id=prompts.pad_id
        ),
        action_first_id=actions.first_id,
        action_stop_id=actions.stop_id,
    )
