"""Prompts as tokens: a word-level vocabulary that needs no download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

PAD, BOS, UNK = "[PAD]", "[BOS]", "[UNK]"
WORDS = Path(__file__).with_name("libero_words.txt")
"""One lower-case word or mark a line: all that LIBERO's 130 instructions and the prompt use. The line is the id
that weights were trained on, so append, never insert."""


def prompt(instruction: str) -> str:
    """OpenVLA's prompt for a task (arXiv 2406.09246, section 3.2)."""
    return f"In: What action should the robot take to {instruction.lower()}?\nOut:"


class PromptTokenizer:
    """Words to ids: [PAD] 0, [BOS] 1, [UNK] 2, then the word list. An unknown word is [UNK]."""

    def __init__(self) -> None:
        tokens = [PAD, BOS, UNK, *WORDS.read_text(encoding="utf-8").split()]
        self._tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNK))
        self._tokenizer.normalizer = normalizers.Lowercase()
        self._tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        self.size = len(tokens)
        self.pad_id, self.bos_id, self.unk_id = 0, 1, 2

    def encode(self, instruction: str) -> list[int]:
        """[BOS] and the ids of the instruction's prompt."""
        return [self.bos_id, *self._tokenizer.encode(prompt(instruction), add_special_tokens=False).ids]

    def stack(self, instructions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts right-padded to the longest: ids int64 [B, T] and mask bool [B, T], true at real tokens."""
        return stack_rows([self.encode(instruction) for instruction in instructions], self.pad_id)


def stack_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token rows right-padded to the longest: ids int64 [B, T] and mask bool [B, T], true at real tokens."""
    ids = np.full((len(rows), max(map(len, rows))), pad_id, dtype=np.int64)
    mask = np.zeros(ids.shape, dtype=bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return ids, mask
