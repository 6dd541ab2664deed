"""Text of invented languages, and what tasks on it share: its splits, and minibatches of windows.

A language is a small grammar over drawn words, so that there is something to learn at every range:
letters within syllables, words of a lexicon, the order of word classes, agreement between words.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import check_number, check_seed
from ._base import Batch, BatchedRun, Task
from ._data import check_held_out, check_split, train_part

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ALPHABET", "TextRun", "TextTask", "draw_text", "load_text"]

ALPHABET = " ,.abcdefghijklmnopqrstuvwxyz"
_VOWELS, _CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"
_TRAIN, _TEST = 90_000, 10_000
_LEXICON = {"determiner": 6, "adjective": 60, "noun": 120, "verb": 80, "conjunction": 4}


class _Language:
    """A lexicon with Zipf's frequencies and a sentence grammar.

    Only ``Random.random`` is drawn from: what it gives for a seed is the same in all versions of
    Python.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.words = {kind: self._lexicon(kind, size) for kind, size in _LEXICON.items()}
        self.totals = {
            kind: list(accumulate(1 / (rank + 1) for rank in range(len(words))))
            for kind, words in self.words.items()
        }

    def _chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def _pick(self, items: Sequence[str]) -> str:
        return items[int(self.random.random() * len(items))]

    def _lexicon(self, kind: str, size: int) -> list[str]:
        words: dict[str, None] = {}
        while len(words) < size:
            short = kind in ("determiner", "conjunction")
            syllables = 1 if short else 1 + int(self.random.random() * 3)
            word = "".join(self._syllable() for _ in range(syllables))
            words.setdefault(word)
        return list(words)

    def _syllable(self) -> str:
        coda = self._pick(_CONSONANTS) if self._chance(0.3) else ""
        return self._pick(_CONSONANTS) + self._pick(_VOWELS) + coda

    def _word(self, kind: str) -> str:
        totals = self.totals[kind]
        return self.words[kind][bisect(totals, self.random.random() * totals[-1])]

    def _nouns(self) -> list[str]:
        adjectives = [self._word("adjective")] if self._chance(0.4) else []
        return [self._word("determiner"), *adjectives, self._word("noun")]

    def _clause(self) -> list[str]:
        subject, verb = self._nouns(), self._word("verb")
        # A verb agrees with the noun before it: that it ends in a vowel shows at the verb's end.
        ending = "s" if subject[-1][-1] in _VOWELS else "n"
        return [*subject, verb + ending, *(self._nouns() if self._chance(0.7) else [])]

    def sentence(self) -> str:
        """One or two clauses, with the full stop and a space."""
        text = " ".join(self._clause())
        if self._chance(0.3):
            text += ", " + " ".join([self._word("conjunction"), *self._clause()])
        return text + ". "


def draw_text(length: int, language: int = 0) -> str:
    """The first ``length`` characters of a text in an invented language, over ``ALPHABET``.

    Example:
        >>> draw_text(40)
        'ti fimi gasemxos ni yevobeb. ti xilo tar'
    """
    grammar, pieces, drawn = _Language(language), [], 0
    while drawn < length:
        pieces.append(grammar.sentence())
        drawn += len(pieces[-1])
    return "".join(pieces)[:length]


@lru_cache(maxsize=4)
def load_text(language: int) -> tuple[Tensor, Tensor]:
    """Training and test text of a language, 90,000 and 10,000 characters as places in ALPHABET."""
    places = {character: place for place, character in enumerate(ALPHABET)}
    text = torch.tensor([places[character] for character in draw_text(_TRAIN + _TEST, language)])
    return text[:_TRAIN], text[_TRAIN:]


class TextTask(Task):
    """A task on minibatches of windows of text: the next character at each place of a window.

    Args:
        length: characters a window that are predicted, each from those before it in the window.
        batch_size: windows a minibatch, drawn uniformly with replacement at every evaluation.
        language: which of the invented languages; 0, 1, 2 ... have different words.
        split: of the text, of 90,000 characters for training and 10,000 for tests: see
            ``MLPClassification``.
        fraction: share of the training text that is for meta-training.
    """

    def __init__(
        self, length: int, batch_size: int, language: int, split: str, fraction: float
    ) -> None:
        check_number("length", length, minimum=1, integer=True)
        check_number("batch_size", batch_size, minimum=1, integer=True)
        check_seed(language, "language")
        check_split(split, fraction)
        self.length, self.batch_size, self.language = length, batch_size, language
        self.split, self.fraction = split, fraction

    def config(self) -> dict[str, Any]:
        names = ("length", "batch_size", "language", "split", "fraction")
        return {name: getattr(self, name) for name in names}

    def held_out(self) -> Self:
        """The same task on text that meta-training does not see, if it is on ``"meta_train"``."""
        return self.with_options(split="meta_valid") if self.split == "meta_train" else self

    def examples(self) -> Tensor:
        """The split's text ``(N,)``, as places in the alphabet.

        Raises:
            ValueError: if it is shorter than a window.
        """
        train, test = load_text(self.language)
        if self.split != "test":
            test = train[train_part(len(train), self.split, self.fraction, "characters")]
        if len(test) <= self.length:
            raise ValueError(
                f"length = {self.length} needs {self.length + 1} characters, and split "
                f"{self.split!r} has {len(test)}; choose a shorter length or another split"
            )
        return test


class TextRun(BatchedRun):
    """Draws places in the text; its function reads windows ``(R, B, length + 1)``."""

    def __init__(
        self, task: TextTask, tensors: dict[str, Tensor], generator: torch.Generator
    ) -> None:
        super().__init__(tensors, generator)
        self.task = task
        # All windows, as views of the text.
        self.windows = task.examples().unfold(0, task.length + 1, 1)

    def next_batch(self) -> Batch:
        shape = (self.num_runs, self.task.batch_size)
        return (torch.randint(len(self.windows), shape, generator=self.generator),)

    def full_batch(self) -> Batch:
        # Windows side by side predict every character once.
        places = torch.arange(0, len(self.windows), self.task.length)
        return (places.expand(self.num_runs, -1),)

    def held_out(self, generator: torch.Generator) -> Self:
        return type(self)(check_held_out(self.task), {"params": self.params}, generator)

    def gather(self, batch: Batch) -> Batch:
        (places,) = batch
        return (self.windows[places],)
