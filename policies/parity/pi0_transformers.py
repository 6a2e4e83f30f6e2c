"""Family `pi0_transformers`: pi-0 against transformers' `PI0ForConditionalGeneration`.

* config.json: the class's own PI0Config, whole or under one of `CONFIGS`; `num_steps` where the sampler took other than
  its `num_inference_steps`.
* inputs, under transformers' names: `input_ids` [B, P] with the image tokens in front of the text, `attention_mask`,
  `pixel_values` [B, C, 3, rows, columns], `pixel_attention_mask` [B, C], `state`, `noise`, `timestep`, `actions`; or
  under openpi's: `tokenized_prompt`, `tokenized_prompt_mask`, `image.<camera>`, `image_mask.<camera>`, `state`, `x_t`
  and `t`, `noise`, `time` and `actions`, `sample_noise`.
* expected: `logits` or another name of `VELOCITIES`; `loss` or another of `LOSSES`, by element or reduced; sampled
  chunks as `sample_actions` or `sampled_actions`, with `_<n>steps` behind it too; `image_features`; `grad.<key>`, of
  the loss's sum where `loss_reduction` is `sum`, else of its mean.

`forward` reads `noise` as the noisy chunk itself where it is given no `actions`, and puts the chunk between them and
the noise where it is. A fixture that has `actions` and no `x_t` does not say which of the two its velocity is of:
either is read.

Letters: B observations, C cameras, P prefix tokens, L prompt tokens, H actions of a chunk, A action dimensions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PI0Config

from objectives.flow_matching import noisy_chunk, velocity_errors
from policies.decoding.prefix import PrefixCache
from policies.parity.fixture import Family, Fixture, FixtureError, Output
from policies.pi0.checkpoint import LAYOUTS, check_weights, load_pi0
from policies.pi0.network import Pi0Network
from policies.pi0.sizes import config_of_transformers

CONFIGS = ("pi0_config", "official_hf_config", "hf_config", "transformers_config", "model_config", "config")
"""Where in config.json the official configuration may lie."""
VELOCITIES = ("logits", "velocity", "predicted_velocity", "v_t", "v_t_joint", "v_t_train")
LOSSES = ("loss", "losses", "loss_per_element", "mean_loss", "loss_mean")
_SAMPLED = re.compile(r"sampled?_actions(?:_(\d+)_?steps?)?")
_SETTINGS = (
    "vlm_config",
    "dit_config",
    "chunk_size",
    "max_state_dim",
    "max_action_dim",
    "num_inference_steps",
    "min_period",
    "max_period",
    "loss_reduction",
)
_LOSS_RELATIVE = 1e-5
"""Losses of tens, and gradients of summed ones, are right to float32's precision only."""


def compute(fixture: Fixture) -> dict[str, Output]:
    """Every expected tensor of a known name. Raises ValueError in one line for settings, weights or inputs that do not
    fit, or where no name is known."""
    official = _official(fixture)
    file, config = fixture.folder / "weights.safetensors", config_of_transformers(official)
    check_weights(file, config)  # before memory is taken for sizes that may not be the weights' own
    network = load_pi0(file, config)
    run = _Run(fixture=fixture, official=official, network=network)
    found = dict(_outputs(run))
    if not any(name in (*VELOCITIES, *LOSSES) or _SAMPLED.fullmatch(name) for name in found):
        raise FixtureError(
            f"{fixture.folder / 'expected.safetensors'} has no velocity, loss or sampled chunk of a known name: "
            f"expected one of {', '.join((*VELOCITIES, *LOSSES))}, sample_actions, found {sorted(fixture.expected)}"
        )
    return found


FAMILY = Family(compute=compute)


def _official(fixture: Fixture) -> PI0Config:
    nested = (fixture.config.get(key) for key in CONFIGS)
    given = next((part for part in nested if isinstance(part, dict)), fixture.config)
    if not {"vlm_config", "dit_config"} & set(given):
        raise FixtureError(
            f"{fixture.folder / 'config.json'} has no PI0Config: expected its vlm_config and dit_config, there or "
            f"under one of {', '.join(CONFIGS)}; it has {sorted(given)}"
        )
    try:
        return PI0Config(**{key: given[key] for key in _SETTINGS if key in given})
    except StrictDataclassError as error:
        raise FixtureError(f"{fixture.folder / 'config.json'}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The network over the fixture's prefix."""

    fixture: Fixture
    official: PI0Config
    network: Pi0Network

    def first(self, *names: str) -> torch.Tensor:
        """The first of these inputs that there is. Raises FixtureError naming the first of all."""
        return self.fixture.input(next((name for name in names if name in self.fixture.inputs), names[0]))

    @cached_property
    def images(self) -> torch.Tensor:
        """Float [B, C, 3, rows, columns]."""
        if "pixel_values" in self.fixture.inputs:
            return self.fixture.input("pixel_values")
        return torch.stack([self.fixture.input(f"image.{camera}") for camera in self._cameras()], dim=1)

    @cached_property
    def camera_mask(self) -> torch.Tensor:
        """Bool [B, C]."""
        if "pixel_values" in self.fixture.inputs:
            everywhere = torch.ones(self.images.shape[:2])
            return self.fixture.inputs.get("pixel_attention_mask", everywhere).bool()
        masks = [self.fixture.input(f"image_mask.{camera}") for camera in self._cameras()]
        return torch.stack(masks, dim=1).bool()

    def _cameras(self) -> list[str]:
        names = [name.removeprefix("image.") for name in self.fixture.inputs if name.startswith("image.")]
        if not names:
            self.fixture.input("pixel_values")
        return list(self.fixture.config.get("image_keys", names))

    @cached_property
    def prompt(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids int64 [B, L] and mask bool [B, L]."""
        vocabulary = self.network.config.vocab
        if "tokenized_prompt" in self.fixture.inputs:
            ids = self.fixture.ids("tokenized_prompt", vocabulary)
            return ids, self.fixture.input("tokenized_prompt_mask").bool()
        vlm: Any = self.official.vlm_config
        image_id = vlm.image_token_id
        ids = self.fixture.ids("input_ids", vocabulary, also=image_id)
        return _without_images(
            self.fixture,
            ids,
            self.fixture.input("attention_mask").bool(),
            image_id,
            self.camera_mask.sum(dim=1) * self.network.config.vision.tokens,
        )

    def cache(self) -> PrefixCache:
        network = self.network
        return network.encode_prefix(network.embed_prefix(self.images, self.camera_mask, *self.prompt))

    def at(self, x_BHA: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """Velocity float32 [B, H, A]."""
        return self.network.velocity(self.cache(), x_BHA, t_B, self.fixture.input("state"))

    def on_path(self) -> torch.Tensor:
        """Velocity between actions and noise: what `forward` gives with `actions`."""
        t_B = self.first("timestep", "time", "t")
        return self.at(noisy_chunk(self.fixture.input("actions"), self.fixture.input("noise"), t_B), t_B)

    def errors(self) -> torch.Tensor:
        """Unreduced loss [B, H, A]."""
        return velocity_errors(self.on_path(), self.fixture.input("actions"), self.fixture.input("noise"))


def _without_images(
    fixture: Fixture, ids_BP: torch.Tensor, mask_BP: torch.Tensor, image_id: int, images_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The text of every row, right-padded, and its mask. Tokens that do not exist take up no position, so where the
    padding lies means nothing."""
    texts = []
    for row, (ids_P, mask_P, images) in enumerate(zip(ids_BP, mask_BP, images_B.tolist(), strict=True)):
        own = ids_P[mask_P]
        is_image = own == image_id
        if not bool(is_image[:images].all()) or int((ids_P == image_id).sum()) != images:
            raise FixtureError(
                f"{fixture.folder / 'inputs.safetensors'}: row {row} of input_ids has "
                f"{int((ids_P == image_id).sum())} image tokens {image_id}, expected {images} of them (those of the "
                "cameras in pixel_attention_mask) before its text and none elsewhere"
            )
        texts.append(own[images:])
    prompt_BL = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths_B = torch.tensor([len(text) for text in texts])
    return prompt_BL, torch.arange(prompt_BL.shape[1]) < lengths_B[:, None]


def _outputs(run: _Run) -> Iterator[tuple[str, Output]]:
    with torch.no_grad():
        for name, expected in run.fixture.expected.items():
            if name in VELOCITIES:
                yield name, Output(_velocity(run, name, expected))
            elif name in LOSSES:
                yield name, Output(_reduced(run, run.errors(), expected), relative=_LOSS_RELATIVE)
            elif sampled := _SAMPLED.fullmatch(name):
                yield name, Output(_sampled(run, sampled[1]))
            elif name == "image_features":
                yield name, Output(run.network.encode_images(run.images))
    if any(name.startswith("grad.") for name in run.fixture.expected):
        _one_loss(run, run.errors()).backward()
        for name, parameter in run.network.named_parameters():
            if parameter.grad is not None:
                yield (
                    f"grad.{LAYOUTS['transformers'].key(name)}",
                    Output(parameter.grad, relative=_LOSS_RELATIVE),
                )


def _velocity(run: _Run, name: str, expected: torch.Tensor) -> torch.Tensor:
    inputs = run.fixture.inputs
    if name == "v_t_train":
        return run.on_path()
    if "x_t" in inputs:
        return run.at(inputs["x_t"], run.first("t", "timestep", "time"))
    at_noise = run.at(run.fixture.input("noise"), run.first("timestep", "time", "t"))
    if "actions" not in inputs:
        return at_noise
    on_path = run.on_path()
    if expected.shape != on_path.shape:
        return on_path
    return min((at_noise, on_path), key=lambda v: float((v - expected).abs().max()))


def _reduced(run: _Run, errors: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return errors if expected.ndim else _one_loss(run, errors)


def _one_loss(run: _Run, errors: torch.Tensor) -> torch.Tensor:
    return errors.sum() if run.official.loss_reduction == "sum" else errors.mean()


def _sampled(run: _Run, steps: str | None) -> torch.Tensor:
    count = int(steps) if steps else run.fixture.count("num_steps", run.official.num_inference_steps)
    return run.network.sample(
        run.cache(), run.first("sample_noise", "noise"), count, run.fixture.input("state")
    )
