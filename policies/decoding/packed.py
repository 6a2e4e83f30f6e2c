"""Incremental decoding of a Llama decoder without the module overhead, which dominates at small sizes.

The same function as the transformers forward (tests hold it to 1e-5), with each layer's products fused: one
matrix for q, k and v, one for gate and up, the RMSNorm weights and the attention scale folded into them,
rotary embedding as one complex product (the two halves of each head interleaved, alike in q and k, so that
their dot product is unchanged), and keys and values written into tensors allocated once.

Letters: B sequences, S cache slots, D decoder width, H heads, E head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One decoder layer's weights, transposed for `x @ w`."""

    qkv: torch.Tensor
    o: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class PackedDecoder:
    """A decoder's weights as the loops below read them: copies, so pack anew whenever the weights may differ.

    `first_id`..`stop_id` - 1 are the ids that decoding chooses from.
    """

    def __init__(self, language_model: LlamaForCausalLM, *, first_id: int, stop_id: int) -> None:
        """Raises TypeError when a linear layer is not a plain nn.Linear, e.g. carries an adapter: its extra
        terms would be left out without a word."""
        config, model = language_model.config, language_model.model
        if config.num_key_value_heads != config.num_attention_heads or config.hidden_act != "silu":
            raise ValueError(
                "lean decoding knows multi-head attention and SwiGLU, got "
                f"{config.num_key_value_heads} key heads, {config.num_attention_heads} query heads and "
                f"{config.hidden_act}"
            )
        self.heads = config.num_attention_heads
        self.width = config.hidden_size
        # x / hypot(|x|, epsilon) * sqrt(D) is RMSNorm before its weight.
        self._epsilon = torch.tensor(
            math.sqrt(self.width * config.rms_norm_eps), device=language_model.device
        )
        self._root = math.sqrt(self.width)
        self.layers = [
            self._pack(cast(LlamaDecoderLayer, layer), name) for name, layer in model.layers.named_children()
        ]
        head = _weight(language_model.lm_head, "lm_head")[first_id:stop_id]
        self.head = (head * (model.norm.weight * self._root)).T.contiguous()
        self.embeddings = model.embed_tokens.weight[first_id:stop_id]
        self._frequencies = model.rotary_emb.inv_freq

    def _pack(self, layer: LlamaDecoderLayer, name: str) -> PackedLayer:
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = (
            _weight(linear, f"layers.{name}.self_attn.{part}_proj")
            for part, linear in (("q", attention.q_proj), ("k", attention.k_proj), ("v", attention.v_proj))
        )
        qkv = torch.cat([self._interleave(q) * attention.scaling, self._interleave(k), v])
        gate_up = torch.cat(
            [
                _weight(mlp.gate_proj, f"layers.{name}.mlp.gate_proj"),
                _weight(mlp.up_proj, f"layers.{name}.mlp.up_proj"),
            ]
        )
        return PackedLayer(
            qkv=(qkv * (layer.input_layernorm.weight * self._root)).T.contiguous(),
            o=_weight(attention.o_proj, f"layers.{name}.self_attn.o_proj").T.contiguous(),
            gate_up=(gate_up * (layer.post_attention_layernorm.weight * self._root)).T.contiguous(),
            down=_weight(mlp.down_proj, f"layers.{name}.mlp.down_proj").T.contiguous(),
        )

    def _interleave(self, weight: torch.Tensor) -> torch.Tensor:
        """Rows (half, pair) of each head -> (pair, half), so that a rotary pair is one complex number."""
        return weight.unflatten(0, (self.heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def rotations(self, positions: torch.Tensor) -> torch.Tensor:
        """Rotary factors, complex64 [..., E / 2], of integer positions [...]."""
        angles = positions.unsqueeze(-1) * self._frequencies
        return torch.polar(torch.ones_like(angles), angles)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """RMSNorm over the last axis, less the factor that the packed weights carry."""
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self._epsilon)

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """Logits [B, stop_id - first_id] of the last layer's output."""
        return torch.mm(self.norm(hidden_BD), self.head)

    def start(self, prefix_BSD: torch.Tensor, lengths: Sequence[int], steps: int) -> Decoding:
        """Run the prefixes; see `Decoding`."""
        return Decoding(self, prefix_BSD, lengths, steps)


class Decoding:
    """Chunks being decoded: the key/value cache of B sequences, and the output of their last token."""

    hidden_BD: torch.Tensor
    """What the decoder's last layer gave for the newest token of every row."""

    def __init__(
        self, decoder: PackedDecoder, prefix_BSD: torch.Tensor, lengths: Sequence[int], steps: int
    ) -> None:
        """Run the prefixes. The first `lengths[i]` tokens of row i are real and the rest padding; `steps` is
        how many more tokens there will be room for."""
        self._decoder = decoder
        batch, self._filled, width = prefix_BSD.shape
        heads, size = decoder.heads, width // decoder.heads
        device = prefix_BSD.device
        slots = self._filled + steps
        self._caches = [prefix_BSD.new_empty(2, batch, heads, slots, size) for _ in decoder.layers]
        ends_B = torch.tensor(lengths, device=device)
        self.hidden_BD = self._prefill(prefix_BSD, ends_B)
        self._mask: torch.Tensor | None = None
        if min(lengths) < self._filled:
            slot_S = torch.arange(slots, device=device)
            padding_BS = (slot_S >= ends_B[:, None]) & (slot_S < self._filled)
            bias_BS = torch.zeros(batch, slots, device=device).masked_fill(padding_BS, -torch.inf)
            self._mask = bias_BS.repeat_interleave(heads, dim=0).unsqueeze(1)
        positions_TB = torch.arange(steps, device=device)[:, None] + ends_B
        self._turns = decoder.rotations(positions_TB)[:, :, None, None].unbind(0)
        # All that a step writes to and reads from, laid out once: at this size a view costs as much as a sum.
        self._qkv = prefix_BSD.new_empty(batch, 3 * width)
        qkv = self._qkv.view(batch, 3, heads, size)
        self._queries = qkv[:, 0]
        self._rotated = torch.view_as_complex(qkv[:, :2].unflatten(-1, (-1, 2)))
        self._new_keys_values = qkv[:, 1:].transpose(0, 1)
        self._slots = [cache.unbind(3) for cache in self._caches]
        self._keys = [cache[0].flatten(0, 1).transpose(1, 2) for cache in self._caches]
        self._values = [cache[1].flatten(0, 1) for cache in self._caches]
        self._gate_up = prefix_BSD.new_empty(batch, decoder.layers[0].gate_up.shape[1])
        self._gate, self._up = self._gate_up.chunk(2, dim=-1)

    def _prefill(self, prefix_BSD: torch.Tensor, ends_B: torch.Tensor) -> torch.Tensor:
        """Fill the cache; outputs [B, D] of each row's last real token. Padding comes after all that is real, so
        a causal mask is all it takes."""
        decoder = self._decoder
        batch, length, width = prefix_BSD.shape
        turns_S11E = decoder.rotations(torch.arange(length, device=prefix_BSD.device))[:, None, None]
        x = prefix_BSD.flatten(0, 1)
        for layer, cache in zip(decoder.layers, self._caches, strict=True):
            qkv = torch.mm(decoder.norm(x), layer.qkv).view(batch, length, 3, decoder.heads, -1)
            torch.view_as_complex(qkv[:, :, :2].unflatten(-1, (-1, 2))).mul_(turns_S11E)
            queries, keys, values = qkv.permute(2, 0, 3, 1, 4)
            cache[0, :, :, :length], cache[1, :, :, :length] = keys, values
            mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=1.0)
            mixed = mixed.transpose(1, 2).reshape(-1, width)
            if layer is decoder.layers[-1]:
                # Of the last layer's outputs only the last token's is ever read.
                last_B = torch.arange(batch, device=x.device) * length + ends_B - 1
                x, mixed = x[last_B], mixed[last_B]
            x = torch.addmm(x, mixed, layer.o)
            gate, up = torch.mm(decoder.norm(x), layer.gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate) * up, layer.down)
        return x

    def step(self, step: int, embeddings_BD: torch.Tensor) -> None:
        """Feed the chunk's token number `step` (0, 1, ... in turn) of every row; `hidden_BD` becomes its
        output."""
        decoder = self._decoder
        slot = self._filled + step
        turn, seen = self._turns[step], slot + 1
        bias = None if self._mask is None else self._mask[:, :, :seen]
        x = embeddings_BD
        for layer, slots, keys, values in zip(
            decoder.layers, self._slots, self._keys, self._values, strict=True
        ):
            torch.mm(decoder.norm(x), layer.qkv, out=self._qkv)
            self._rotated.mul_(turn)
            slots[slot].copy_(self._new_keys_values)
            queries = self._queries.flatten(0, 1).unsqueeze(1)
            seen_keys = keys[:, :, :seen]
            scores = (
                torch.bmm(queries, seen_keys) if bias is None else torch.baddbmm(bias, queries, seen_keys)
            )
            mixed = torch.bmm(torch.softmax(scores, dim=-1), values[:, :seen])
            x = torch.addmm(x, mixed.view_as(x), layer.o)
            torch.mm(decoder.norm(x), layer.gate_up, out=self._gate_up)
            x = torch.addmm(x, F.silu(self._gate) * self._up, layer.down)
        self.hidden_BD = x


def _weight(linear: nn.Module, name: str) -> torch.Tensor:
    """The weight of a plain, bias-free linear layer; TypeError for one that computes more than that."""
    if type(linear) is not nn.Linear:
        raise TypeError(
            f"decoder layer {name} is a {type(linear).__name__}, expected a plain torch.nn.Linear: "
            "merge the adapter and load the merged weights into a policy of its own before it acts"
        )
    if linear.bias is not None:
        raise TypeError(f"decoder layer {name} has a bias, which lean decoding does not add")
    return linear.weight
