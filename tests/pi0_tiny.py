"""Small networks of pi-0 and pi-0.5 with weights large enough that every mask and position shows, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from policies.decoding.prefix import Prefix
from policies.pi0.checkpoint import Layout
from policies.pi0.network import Pi0Network
from policies.pi0.sizes import Pi0Config, StreamSize, VisionSize

TINY = Pi0Config(
    adaptive=False,
    vision=VisionSize(width=16, depth=2, mlp=24, heads=2, image=28, patch=14),
    vlm=StreamSize(width=24, depth=2, mlp=32, heads=4, kv_heads=2, head_dim=8),
    expert=StreamSize(width=16, depth=2, mlp=24, heads=4, kv_heads=2, head_dim=8),
    vocab=40,
    horizon=5,
    action_dim=6,
    state_dim=7,
)


def tiny_network(*, adaptive: bool) -> Pi0Network:
    torch.manual_seed(3)
    network = Pi0Network(replace(TINY, adaptive=adaptive)).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * (0.2 if "norm" in name else 0.3))
    return network


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs of `Pi0Network.embed_prefix` and noisy chunks."""

    images: torch.Tensor
    cameras: torch.Tensor
    prompt: torch.Tensor
    prompt_mask: torch.Tensor
    x: torch.Tensor
    t: torch.Tensor
    state: torch.Tensor

    def prefix(self, network: Pi0Network) -> Prefix:
        return network.embed_prefix(self.images, self.cameras, self.prompt, self.prompt_mask)

    def velocity(self, network: Pi0Network) -> torch.Tensor:
        return network.velocity(network.encode_prefix(self.prefix(network)), self.x, self.t, self.state)

    def row(self, index: int) -> Batch:
        one = slice(index, index + 1)
        return Batch(**{name: getattr(self, name)[one] for name in self.__dataclass_fields__})


def tiny_batch(size: int = 3) -> Batch:
    """Three cameras, the last absent in every second row; prompts of 4 to 7 tokens."""
    draw = torch.Generator().manual_seed(5)
    cameras = torch.ones(size, 3, dtype=torch.bool)
    cameras[1::2, 2] = False
    lengths = 4 + torch.arange(size) % 4
    return Batch(
        images=torch.rand(size, 3, 3, 28, 28, generator=draw) * 2 - 1,
        cameras=cameras,
        prompt=torch.randint(1, 40, (size, 7), generator=draw),
        prompt_mask=torch.arange(7) < lengths[:, None],
        x=torch.randn(size, 5, 6, generator=draw),
        t=torch.rand(size, generator=draw),
        state=torch.randn(size, 7, generator=draw),
    )


def in_layout(network: Pi0Network, layout: Layout) -> dict[str, torch.Tensor]:
    """The network's tensors under a checkpoint's names, with the tied and the unused ones that it may hold."""
    tensors = {layout.key(name): tensor.clone() for name, tensor in network.state_dict().items()}
    embedding = network.state_dict()["vlm.language_model.embed_tokens.weight"]
    if layout.tied:
        tensors[layout.tied] = embedding.clone()
    return tensors | {layout.unused[0]: torch.zeros(len(embedding), network.config.expert.width)}
