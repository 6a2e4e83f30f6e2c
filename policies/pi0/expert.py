"""What pi-0.5's action expert does otherwise than Gemma: flow time acts through adaptive RMS norms (adaRMS).

openpi, `src/openpi/models/pi0.py` and `gemma.py`; adaptive norms with a gated residual: DiT, arXiv 2212.09748.
transformers' own Gemma layer takes no condition and its residual no gate, so the layer is built here from
transformers' attention, MLP and rotary embedding.

Letters: R rows, T suffix tokens, H actions of a chunk, A action dimensions, E expert width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaMLP, GemmaRotaryEmbedding

from policies.decoding.prefix import PrefixCache
from policies.pi0.sizes import MAX_PERIOD, MIN_PERIOD, NORM_EPS


class TimeEmbedding(nn.Module):
    """Sines, then cosines, of flow time with geometric periods from `MIN_PERIOD` to `MAX_PERIOD`. No parameters.

    In float64, as openpi's PyTorch network: the shortest period turns float32's rounding into 1e-4 radian, and that
    into 5e-4 on the velocities of openpi's tiny pi-0.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, t_R: torch.Tensor) -> torch.Tensor:
        """Flow times [R] -> float64 [R, width]."""
        # Computed anew each time: a buffer would be rounded when the network is cast.
        share = torch.linspace(0, 1, self.width // 2, dtype=torch.float64, device=t_R.device)
        periods = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** share
        angles = t_R.double()[:, None] * (2 * math.pi / periods)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class AdaptiveRMSNorm(nn.Module):
    """RMS norm whose scale and shift, and the gate of the branch that follows, are linear in a condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def forward(self, x_RTE: torch.Tensor, cond_RE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the normalised tokens [R, T, E] and the gate [R, 1, E], in the dtype of `x_RTE`."""
        scale, shift, gate = self.dense(cond_RE).float().unsqueeze(1).chunk(3, dim=-1)
        x = x_RTE.float()
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + NORM_EPS)
        return (x * (1 + scale) + shift).to(x_RTE.dtype), gate.to(x_RTE.dtype)


class AdaptiveLayer(nn.Module):
    """A Gemma layer with adaptive norms; named as `transformers`' own, so that adapters find its linears."""

    def __init__(self, config: GemmaConfig, index: int) -> None:
        super().__init__()
        self.self_attn = GemmaAttention(config, index)
        self.mlp = GemmaMLP(config)
        self.input_layernorm = AdaptiveRMSNorm(config.hidden_size)
        self.post_attention_layernorm = AdaptiveRMSNorm(config.hidden_size)

    def forward(
        self,
        x_RTE: torch.Tensor,
        cond_RE: torch.Tensor,
        *,
        mask: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: PrefixCache,
    ) -> torch.Tensor:
        branch, gate = self.input_layernorm(x_RTE, cond_RE)
        branch, _ = self.self_attn(
            hidden_states=branch, attention_mask=mask, position_embeddings=rotary, past_key_values=cache
        )
        x_RTE = x_RTE + branch * gate
        branch, gate = self.post_attention_layernorm(x_RTE, cond_RE)
        return x_RTE + self.mlp(branch) * gate


class AdaptiveExpert(nn.Module):
    """pi-0.5's action expert: a stack of adaptive layers and an adaptive final norm."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AdaptiveLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = AdaptiveRMSNorm(config.hidden_size)
        self.rotary_emb = GemmaRotaryEmbedding(config)

    def forward(
        self,
        x_RTE: torch.Tensor,
        cond_RE: torch.Tensor,
        *,
        mask: torch.Tensor,
        positions_RT: torch.Tensor,
        cache: PrefixCache,
    ) -> torch.Tensor:
        """Suffix tokens to hidden states [R, T, E]; `mask` is bool [R, 1, T, P + T]."""
        rotary = self.rotary_emb(x_RTE, positions_RT)
        for layer in self.layers:
            x_RTE = layer(x_RTE, cond_RE, mask=mask, rotary=rotary, cache=cache)
        return self.norm(x_RTE, cond_RE)[0]


class AdaptiveSuffix(nn.Module):
    """pi-0.5's suffix: noisy actions as tokens, flow time as the norms' condition. There is no state token."""

    def __init__(self, action_dim: int, width: int) -> None:
        super().__init__()
        self.sinusoid_embeds = TimeEmbedding(width)
        self.action_in_proj = nn.Linear(action_dim, width)
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)

    def forward(self, x_RHA: torch.Tensor, t_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns tokens [R, H, E] and the condition [R, E]."""
        time_RE = self.sinusoid_embeds(t_R).to(self.time_mlp_in.weight.dtype)
        cond_RE = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time_RE))))
        return self.action_in_proj(x_RHA), cond_RE
