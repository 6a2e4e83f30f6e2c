"""Decoding action tokens with vLLM, in process, from prefixes that the torch network embeds.

vLLM is an extra (`make setup-vllm`), and starting it takes half a minute: this module is imported only where a recipe
asks for it (`serving.engine: vllm`).

What it serves is our Llama decoder cut down to the action tokens: they are its whole vocabulary, for prompts come as
embeddings. So nothing but action tokens can be decoded, and its log-probabilities, which vLLM takes before any
processing, are the policy's own: softmax over the action tokens alone at temperature 1. So are the draws: the Gumbel
noise of a request's seed goes onto its logits, and the likeliest token is taken. Both engines thus choose the same
tokens, save where rounding decides between two that are all but level.

Weights are always whole: vLLM refuses DoRA, and an adapter never gets here. They are handed over in process when they
have moved since the last batch.

Letters: B decisions, S prefix tokens, L tokens of a chunk, V action bins, D decoder width.
"""

from __future__ import annotations

import os

# Read by vLLM when it is imported or started. One process, so that weights are handed over and not sent; no threads
# pinned to cores that others share; no report of our use to its makers.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.inputs import EmbedsPrompt
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from policies.decoding.engine import gumbel_noise

ROOM = 1024
"""Tokens that a prefix and its chunk may have together."""
_BLOCK = 128
"""Tokens of the largest cache block that vLLM uses of its own accord."""


class SeededNoise(AdapterLogitsProcessor):
    """Adds temperature * `gumbel_noise` of a request's seed to its logits; `extra_args` name both."""

    def is_argmax_invariant(self) -> bool:
        """The noise is there to move the argmax."""
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        """What vLLM calls with a request's tokens so far and its next logits [V]; None for a greedy request."""
        wanted = params.extra_args or {}
        temperature = wanted.get("temperature", 0.0)
        if not temperature:
            return None
        drawn_LV: torch.Tensor | None = None

        def add(chosen: list[int], logits_V: torch.Tensor) -> torch.Tensor:
            nonlocal drawn_LV
            if drawn_LV is None:
                drawn_L1V = gumbel_noise([wanted["seed"]], params.max_tokens, len(logits_V))
                drawn_LV = (temperature * drawn_L1V[:, 0]).to(logits_V.device)
            return logits_V + drawn_LV[len(chosen)]

        return add


class VllmEngine:
    """Meets `policies.decoding.engine.Engine`, for decoders of one architecture whatever their weights.

    One engine a process, shared by every policy served there: vLLM keeps its parallel state process-wide and takes it
    down with the first engine that goes. Once started, it keeps `torch.set_num_threads` from having an effect.
    """

    def __init__(
        self, language_model: LlamaForCausalLM, *, first_id: int, stop_id: int, tokens: int, max_batch: int
    ) -> None:
        """Start vLLM for decoders like `language_model`, on its device and in its dtype.

        Action ids are `first_id`..`stop_id` - 1, a chunk `tokens` of them; `max_batch` is how many chunks have room in
        the cache at once. Raises ValueError when the installed vLLM is for another kind of device, or its attention
        has no room for the decoder's heads.
        """
        device, kind = language_model.device, current_platform.device_type
        if device.type != kind:
            raise ValueError(
                f"the policy is on {device} and the installed vLLM is for {kind}; serve on {kind}, or install the "
                "vLLM for this device"
            )
        self._first_id = first_id
        self._stop_id = stop_id
        self._tokens = tokens
        self._head_size = served_head_size(head_size(language_model), kind)
        self._room = min(ROOM, language_model.config.max_position_embeddings)
        self._loaded: tuple[LlamaForCausalLM, tuple[tuple[int, int], ...]] | None = None
        with tempfile.TemporaryDirectory(prefix="pairloom-vllm-") as folder:
            config = self._config(language_model)
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            self._llm = LLM(
                model=folder,
                load_format="dummy",  # the weights are handed over with the first batch
                dtype=config["dtype"],
                skip_tokenizer_init=True,
                enable_prompt_embeds=True,
                enable_prefix_caching=False,  # a cached prefix would outlive the weights that made it
                enforce_eager=True,
                async_scheduling=False,  # the noise of a token goes by how many came before it
                logits_processors=[SeededNoise],
                logprobs_mode="raw_logprobs",
                max_model_len=self._room,
                max_num_seqs=max_batch,
                kv_cache_memory_bytes=self._cache_bytes(language_model, max_batch),
                gpu_memory_utilization=0.01,  # with the cache sized, only how much must be free to start
                disable_log_stats=True,
            )

    def decode(
        self,
        language_model: LlamaForCausalLM,
        prefix_BSD: torch.Tensor,
        lengths: Sequence[int],
        *,
        seeds: Sequence[int],
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `policies.decoding.engine.Engine`. Raises ValueError for a prefix too long for the engine."""
        if max(lengths) + self._tokens > self._room:
            raise ValueError(
                f"a prefix of {max(lengths)} tokens and a chunk of {self._tokens} exceed the {self._room} tokens that "
                "vLLM was started for; serve such a policy with serving.engine=torch"
            )
        self.follow(language_model)
        prompts = [
            EmbedsPrompt(prompt_embeds=prefix_SD[:n])
            for prefix_SD, n in zip(prefix_BSD, lengths, strict=True)
        ]
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=self._tokens,
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
                extra_args={"seed": int(seed), "temperature": temperature},
            )
            for seed in seeds
        ]
        chunks = [answer.outputs[0] for answer in self._llm.generate(prompts, params, use_tqdm=False)]
        chosen_BL = [list(chunk.token_ids) for chunk in chunks]
        logps_BL = [
            [told[token].logprob for told, token in zip(chunk.logprobs, chunk.token_ids, strict=True)]
            for chunk in chunks
        ]
        device = prefix_BSD.device
        chosen = torch.tensor(chosen_BL, dtype=torch.int64, device=device).T
        return chosen, torch.tensor(logps_BL, dtype=torch.float32, device=device).T

    def follow(self, language_model: LlamaForCausalLM) -> None:
        """Hand its weights over to vLLM, in place, unless they are what vLLM has: the same tensors, unwritten since.

        Raises TypeError while an adapter sits on the decoder.
        """
        # Autograd counts the writes to each tensor. The model is kept too: a tensor that is alive shares no address.
        stamp = tuple((tensor.data_ptr(), tensor._version) for tensor in language_model.parameters())
        if self._loaded is not None and self._loaded[0] is language_model and self._loaded[1] == stamp:
            return
        self._loaded = None
        weights = served_weights(
            language_model, first_id=self._first_id, stop_id=self._stop_id, served_size=self._head_size
        )
        # The CPU build packs weights and drops the tensors: reloading restores them first and packs anew, where
        # copying into the model would be lost. Parameters made in inference mode could not be written to again.
        with torch.inference_mode(False):
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
        self._loaded = (language_model, stamp)

    def _config(self, language_model: LlamaForCausalLM) -> dict[str, Any]:
        """The decoder's configuration, with the action tokens for a vocabulary and heads as they are served."""
        config = language_model.config.to_dict()
        rope, size = dict(config["rope_parameters"]), head_size(language_model)
        if self._head_size != size:
            # Only a head's own entries are rotated. vLLM truncates the product with the factor, hence the half.
            rope["partial_rotary_factor"] = (size + 0.5) / self._head_size
        return config | {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self._stop_id - self._first_id,
            "head_dim": self._head_size,
            "rope_parameters": rope,
            "tie_word_embeddings": False,
            "dtype": str(language_model.dtype).removeprefix("torch."),
            # Ids of the whole vocabulary.
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }

    def _cache_bytes(self, language_model: LlamaForCausalLM, max_batch: int) -> int:
        """Keys and values of `max_batch` chunks and their prefixes, and a spare."""
        config = language_model.config
        heads = config.num_key_value_heads or config.num_attention_heads
        numbers = 2 * config.num_hidden_layers * heads * self._head_size
        blocks = (max_batch + 1) * -(-self._room // _BLOCK)
        return blocks * _BLOCK * numbers * language_model.dtype.itemsize


def head_size(language_model: LlamaForCausalLM) -> int:
    """Width of one attention head."""
    config = language_model.config
    return config.head_dim or config.hidden_size // config.num_attention_heads


def served_head_size(size: int, device_type: str) -> int:
    """The least size of an attention head, `size` or more, that vLLM's attention knows on a kind of device.

    Its CPU kernels know some sizes only; on others it says for itself what it cannot do. Raises ValueError when there
    is none.
    """
    if device_type != "cpu":
        return size
    known = sorted(CPUAttentionBackend.get_supported_head_sizes())
    served = next((s for s in known if s >= size), None)
    if served is None:
        raise ValueError(
            f"vLLM's CPU attention knows heads of {', '.join(map(str, known))}, and the decoder's are {size} wide; "
            "use serving.engine=torch"
        )
    return served


def served_weights(
    language_model: LlamaForCausalLM, *, first_id: int, stop_id: int, served_size: int
) -> dict[str, torch.Tensor]:
    """A decoder's tensors as vLLM is handed them: rows of the action ids only in the embedding and the head, and
    attention heads widened to `served_size` by zeros, which change nothing (queries make up for the larger root that
    scores are then divided by).

    Raises TypeError while an adapter sits on the decoder: its terms would be left out without a word.
    """
    size = head_size(language_model)
    extra = served_size - size
    served = {}
    for name, tensor in language_model.state_dict().items():
        if "lora_" in name or ".base_layer." in name:
            raise TypeError(f"{name} belongs to an adapter; vLLM is served merged weights, so merge it first")
        weight = tensor.detach()
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            weight = weight[first_id:stop_id]
        elif extra and any(part in name for part in ("q_proj", "k_proj", "v_proj")):  # biases too
            heads = weight.unflatten(0, (-1, size))
            weight = F.pad(heads, (0, 0) * (heads.ndim - 2) + (0, extra)).flatten(0, 1)
            if "q_proj" in name:
                weight = weight * (served_size / size) ** 0.5
        elif extra and name.endswith("o_proj.weight"):
            weight = F.pad(weight.unflatten(1, (-1, size)), (0, extra)).flatten(1)
        served[name] = weight
    return served
