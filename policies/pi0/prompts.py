"""PaliGemma's vocabulary, read from the tokenizer.json that lies beside a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from policies.encoding.prompts import stack_rows
from policies.pi0.preprocessing import PI0_PROMPT_LENGTH, PI05_PROMPT_LENGTH, prompt_ids

TOKENIZER = "tokenizer.json"
BOS, BOS_ID = "<bos>", 2
LINE_FEED, LINE_FEED_ID = "\n", 108
"""Ends pi-0's prompts, and stands in pi-0.5's."""
PAD_ID = 0


class PaligemmaPrompts:
    """Instructions, and for pi-0.5 states, to the ids that openpi's tokenizer gives."""

    def __init__(self, folder: Path, *, vocab_size: int) -> None:
        """`vocab_size` is the network's. Raises ValueError in one line when the folder has no tokenizer.json or has
        another model's."""
        file = folder / TOKENIZER
        if not file.is_file():
            raise ValueError(
                f"{folder} has no {TOKENIZER}; put PaliGemma's there (google/paligemma-3b-pt-224 on the Hub has it; "
                "a SentencePiece .model is not read)"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception, whatever is wrong
            raise ValueError(f"{file} cannot be read as a tokenizer: {error}") from error
        size = self._tokenizer.get_vocab_size(with_added_tokens=False)
        if size > vocab_size:
            raise ValueError(f"{file} is a tokenizer of {size} tokens, the network knows {vocab_size}")
        for text, ids in ((BOS, [BOS_ID]), (LINE_FEED, [LINE_FEED_ID])):
            found = self.encode(text)
            if found != ids:
                raise ValueError(
                    f"{file}: {text!r} is {found}, expected {ids}; this is not PaliGemma's tokenizer"
                )

    def encode(self, text: str) -> list[int]:
        """Ids without BOS or EOS."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def stack(
        self, instructions: Sequence[str], states: Sequence[np.ndarray] | None, *, adaptive: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Prompts right-padded to the longest: ids int64 [B, T] and mask bool [B, T], true at real tokens.

        `states`, normalised, are told in pi-0.5's prompt (`adaptive`). Raises ValueError for a prompt longer than
        openpi allows. openpi pads to that length, but no token sees padding.
        """
        length = PI05_PROMPT_LENGTH if adaptive else PI0_PROMPT_LENGTH
        rows = []
        for i, instruction in enumerate(instructions):
            state = None if states is None else states[i]
            ids, real = prompt_ids(
                instruction, encode=self.encode, bos_id=BOS_ID, length=length, state_S=state
            )
            rows.append(ids[real].tolist())
        return stack_rows(rows, PAD_ID)
