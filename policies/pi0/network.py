"""The networks of pi-0 (arXiv 2410.24164) and pi-0.5 (arXiv 2504.16054), computing what openpi computes.

Both are a PaliGemma that reads images and prompt (the prefix) and a smaller Gemma, the action expert, whose
tokens (the suffix: noisy actions, in pi-0 a state token before them) attend, layer by layer, to the prefix and to
themselves. The last hidden states give the velocity of a flow from noise (t = 1) to actions (t = 0).

Letters: B observations, C cameras, L prompt tokens, I tokens of an image, P prefix tokens, R rows of a suffix
pass, T suffix tokens, H actions of a chunk, A action dimensions, S state dimensions, D width of the language
model, E of the expert. In images alone, X is their three channels and HW their rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PaliGemmaModel, PI0ForConditionalGeneration

from policies.decoding.prefix import Prefix, PrefixCache, encode_prefix, suffix_places
from policies.pi0.expert import AdaptiveExpert, AdaptiveSuffix, TimeEmbedding
from policies.pi0.sizes import Pi0Config, expert_config, paligemma_config, pi0_config


@dataclass(frozen=True, kw_only=True, slots=True)
class Suffix:
    """Embedded state and noisy actions, before attention."""

    tokens_RTE: torch.Tensor
    starts_T: torch.Tensor
    """bool: tokens that open a block, see `attention_mask`."""
    cond_RE: torch.Tensor | None
    """Condition of pi-0.5's norms; none in pi-0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EulerStep:
    """One step of the sampler."""

    t: torch.Tensor
    """Flow time, float32 scalar."""
    x_RHA: torch.Tensor
    """The chunk before the step."""
    v_RHA: torch.Tensor
    """Its velocity."""
    next_RHA: torch.Tensor
    """The chunk after the step."""


class Pi0Network(nn.Module):
    """pi-0 or, where `config.adaptive`, pi-0.5.

    pi-0's parts are those of `transformers.PI0ForConditionalGeneration`, which computes openpi's function but for
    its float32 time embedding, replaced here unless `config.time` is "transformers". Its `forward` and
    `sample_actions` are not called: they unpack cameras row by row on the host, write each pass into the
    prefix's cache and crop it again, so that no two passes can share a prefix, and take the times of Euler
    steps as 1 + k dt where openpi sums them up, which the time embedding turns into 1e-4 on a chunk. pi-0.5
    is not in transformers; its language model is the same `PaliGemmaModel`, its expert `policies.pi0.expert`.

    State dict: `vlm.*`, `expert.*`, `suffix.*`, `action_out_proj.*`. Computes in the dtype of its parameters; chunks
    and velocities are float32.
    """

    def __init__(self, config: Pi0Config) -> None:
        """Random weights from torch's current generator; on the `meta` device none at all."""
        super().__init__()
        self.config = config
        if config.adaptive:
            self.vlm = PaliGemmaModel(paligemma_config(config))
            self.expert: nn.Module = AdaptiveExpert(expert_config(config))
            self.suffix: nn.Module = AdaptiveSuffix(config.action_dim, config.expert.width)
            self.action_out_proj = nn.Linear(config.expert.width, config.action_dim)
        else:
            pi0 = PI0ForConditionalGeneration(pi0_config(config))
            self.vlm, self.expert = pi0.model.vlm, pi0.model.dit
            self.expert.register_module("embed_tokens", None)  # the expert reads no words
            self.suffix, self.action_out_proj = pi0.embed_action_time, pi0.action_out_proj
            if config.time == "openpi":
                self.suffix.set_submodule("sinusoid_embeds", TimeEmbedding(config.expert.width))

    def encode_images(self, images_BCXHW: torch.Tensor) -> torch.Tensor:
        """Float images in [-1, 1], [B, C, 3, H, W] -> image tokens [B, C, I, D].

        An adapter on language model or expert leaves these alone, so they may be computed once and kept.
        """
        batch, cameras = images_BCXHW.shape[:2]
        pixels = images_BCXHW.flatten(0, 1).to(self.vlm.dtype)
        return self.vlm.get_image_features(pixels).pooler_output.unflatten(0, (batch, cameras))

    def join_prefix(
        self,
        image_tokens_BCID: torch.Tensor,
        camera_mask_BC: torch.Tensor,
        prompt_BL: torch.Tensor,
        prompt_mask_BL: torch.Tensor,
    ) -> Prefix:
        """Image tokens, camera after camera, then the prompt's embeddings (times the root of their width)."""
        text_BLD = self.vlm.get_input_embeddings()(prompt_BL)
        image_mask = camera_mask_BC.bool().repeat_interleave(image_tokens_BCID.shape[2], dim=1)
        return Prefix(
            tokens_BPD=torch.cat([image_tokens_BCID.flatten(1, 2).to(text_BLD.dtype), text_BLD], dim=1),
            mask_BP=torch.cat([image_mask, prompt_mask_BL.bool()], dim=1),
        )

    def embed_prefix(
        self,
        images_BCXHW: torch.Tensor,
        camera_mask_BC: torch.Tensor,
        prompt_BL: torch.Tensor,
        prompt_mask_BL: torch.Tensor,
    ) -> Prefix:
        """Images in [-1, 1] and prompt ids to the prefix; the masks are True where a camera or token exists.

        A camera that is absent everywhere may be left out instead: masked tokens take up no position.
        """
        return self.join_prefix(self.encode_images(images_BCXHW), camera_mask_BC, prompt_BL, prompt_mask_BL)

    def encode_prefix(self, prefix: Prefix) -> PrefixCache:
        """Run the language model over the prefix, every token attending to every other that exists."""
        return encode_prefix(self.vlm.language_model, prefix)

    def embed_suffix(
        self, x_RHA: torch.Tensor, t_R: torch.Tensor, state_RS: torch.Tensor | None = None
    ) -> Suffix:
        """Noisy chunks and their flow times to suffix tokens; pi-0.5 ignores the state, which is in its prompt.

        Raises ValueError where pi-0 is given no state.
        """
        x_RHA = x_RHA.to(self.action_out_proj.weight.dtype)
        starts_T = torch.zeros(x_RHA.shape[1], dtype=torch.bool, device=x_RHA.device)
        starts_T[0] = True
        if self.config.adaptive:
            tokens_RTE, cond_RE = self.suffix(x_RHA, t_R)
            return Suffix(tokens_RTE=tokens_RTE, starts_T=starts_T, cond_RE=cond_RE)
        if state_RS is None:
            raise ValueError("pi-0 reads the state: give it [rows, state_dim], normalised and padded")
        tokens_RTE = self.suffix(state_RS.to(x_RHA.dtype), x_RHA, t_R)
        # The state is a block of its own before the actions: it does not see them.
        return Suffix(tokens_RTE=tokens_RTE, starts_T=torch.cat([starts_T[:1], starts_T]), cond_RE=None)

    def embed_time(self, t_R: torch.Tensor) -> torch.Tensor:
        """Sines and cosines of flow times [R, E], float64 (transformers' float32)."""
        return self.suffix.get_submodule("sinusoid_embeds")(t_R)

    def run_suffix(self, cache: PrefixCache, suffix: Suffix) -> torch.Tensor:
        """The expert's last hidden states [R, T, E]. Raises ValueError when rows and cache do not agree."""
        rows = len(suffix.tokens_RTE)
        if rows != cache.rows:
            raise ValueError(
                f"{rows} chunks for a cache of {len(cache.mask_BP)} prefixes x {cache.repeats}: expected {cache.rows}"
            )
        mask, positions_RT = suffix_places(cache, suffix.starts_T)
        tokens_RTE = suffix.tokens_RTE.to(cache.keys[0].dtype)
        if self.config.adaptive:
            cond_RE = suffix.cond_RE
            return self.expert(tokens_RTE, cond_RE, mask=mask, positions_RT=positions_RT, cache=cache)
        return self.expert(
            inputs_embeds=tokens_RTE,
            attention_mask=mask,
            position_ids=positions_RT,
            past_key_values=cache,
            use_cache=False,
        ).last_hidden_state

    def velocity(
        self,
        cache: PrefixCache,
        x_RHA: torch.Tensor,
        t_R: torch.Tensor,
        state_BS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Velocity float32 [R, H, A] of noisy chunks at flow times `t_R`, given encoded prefixes.

        Rows are those of `cache`: B, or B x repeats with the chunks of one observation side by side; the state is
        per observation. Raises ValueError when they do not fit.
        """
        if state_BS is not None:
            state_BS = state_BS.repeat_interleave(cache.repeats, dim=0)
        hidden_RTE = self.run_suffix(cache, self.embed_suffix(x_RHA, t_R, state_BS))
        hidden_RHE = hidden_RTE[:, -x_RHA.shape[1] :].to(self.action_out_proj.weight.dtype)
        return self.action_out_proj(hidden_RHE).float()

    def velocity_joint(
        self,
        images_BCXHW: torch.Tensor,
        camera_mask_BC: torch.Tensor,
        prompt_BL: torch.Tensor,
        prompt_mask_BL: torch.Tensor,
        *,
        x_BHA: torch.Tensor,
        t_B: torch.Tensor,
        state_BS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Velocity float32 [B, H, A] from the raw inputs, differentiable in everything: the path of training.

        openpi trains with prefix and suffix interleaved in one pass. No prefix token sees the suffix, so one pass
        after the other is the same function with the same gradient.
        """
        prefix = self.embed_prefix(images_BCXHW, camera_mask_BC, prompt_BL, prompt_mask_BL)
        return self.velocity(self.encode_prefix(prefix), x_BHA, t_B, state_BS)

    def integrate(
        self,
        cache: PrefixCache,
        noise_RHA: torch.Tensor,
        steps: int,
        state_BS: torch.Tensor | None = None,
    ) -> Iterator[EulerStep]:
        """Euler's method from t = 1 to t = 0 in `steps` equal steps. Raises ValueError for no steps."""
        if steps < 1:
            raise ValueError(f"steps must be 1 or more, got {steps}")
        # openpi sums time up in float32: the time embedding's shortest period feels the rounding.
        t = torch.ones((), dtype=torch.float32, device=noise_RHA.device)
        dt = torch.full_like(t, -1 / steps)
        x_RHA = noise_RHA
        for done in range(1, steps + 1):
            v_RHA = self.velocity(cache, x_RHA, t.expand(len(x_RHA)), state_BS)
            step = EulerStep(t=t, x_RHA=x_RHA, v_RHA=v_RHA, next_RHA=x_RHA + dt * v_RHA)
            yield step
            x_RHA = step.next_RHA
            t = t + dt if self.config.time == "openpi" else torch.full_like(t, 1 + done * (-1 / steps))

    @torch.no_grad()
    def sample(
        self,
        cache: PrefixCache,
        noise_RHA: torch.Tensor,
        steps: int = 10,
        state_BS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Normalised, padded chunks float32 [R, H, A] that the flow makes of `noise_RHA`."""
        *_, last = self.integrate(cache, noise_RHA, steps, state_BS)
        return last.next_RHA
