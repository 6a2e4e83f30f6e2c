"""Prompts as the tokens of an OpenVLA checkpoint: Llama 2's vocabulary, read from the checkpoint's own file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from policies.encoding.prompts import prompt, stack_rows

SPACE, SPACE_ID = "▁", 29871
"""Llama 2's token of a lone space. OpenVLA saw it between every prompt and the first action token."""


class LlamaPrompts:
    """Meets what `PromptTokenizer` does: prompts to right-padded ids."""

    def __init__(
        self, file: Path, *, vocab_size: int, action_first_id: int, bos_id: int, pad_id: int
    ) -> None:
        """`file` is a tokenizer.json; `vocab_size` counts text and action ids, without padding ids.

        Raises ValueError in one line when it cannot be read or is not the tokenizer that the checkpoint was trained
        with.
        """
        if not file.is_file():
            raise ValueError(
                f"{file.parent} has no {file.name}; expected the checkpoint's own (a `fast` tokenizer's file)"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception, whatever is wrong
            raise ValueError(f"{file} cannot be read as a tokenizer: {error}") from error
        size = self._tokenizer.get_vocab_size(with_added_tokens=False)
        if size != vocab_size:
            raise ValueError(
                f"{file} is a tokenizer of {size} tokens, the network's is of {vocab_size} (text_config.vocab_size "
                "less pad_to_multiple_of); its last ids would not be the action tokens"
            )
        if self._tokenizer.id_to_token(SPACE_ID) != SPACE:
            raise ValueError(
                f"{file}: token {SPACE_ID} is {self._tokenizer.id_to_token(SPACE_ID)!r}, expected {SPACE!r}, which "
                "ends OpenVLA's prompts; this is not Llama 2's tokenizer"
            )
        for what, token in (("BOS", bos_id), ("padding", pad_id), ("prompt-ending", SPACE_ID)):
            if action_first_id <= token < vocab_size:
                raise ValueError(
                    f"{file}: the {what} token {token} lies among the action tokens {action_first_id}.."
                    f"{vocab_size - 1}, expected the last ids of the vocabulary to be actions alone"
                )
        self.bos_id, self.pad_id = bos_id, pad_id

    def encode(self, instruction: str) -> list[int]:
        """BOS, the ids of the instruction's prompt, and the space token."""
        ids = self._tokenizer.encode(prompt(instruction), add_special_tokens=False).ids
        return [self.bos_id, *ids, *([] if ids[-1] == SPACE_ID else [SPACE_ID])]

    def stack(self, instructions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts right-padded to the longest: ids int64 [B, T] and mask bool [B, T], true at real tokens."""
        return stack_rows([self.encode(instruction) for instruction in instructions], self.pad_id)
