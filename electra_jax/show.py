"""Prints held-out sentences as the discriminator saw them, each token with its probability of being replaced."""

from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.text import Text

_SPACE = "\u2581"   # SentencePiece's mark of a word's start


def examples(batch: dict[str, np.ndarray], seen: dict[str, np.ndarray], token: Callable[[int], str], count: int,
             max_tokens: int = 60) -> list[Text]:
    """Returns `count` annotated sentences, one for each of the first rows of the batch.

    `seen` holds the corrupted `input_ids`, `labels` and `probabilities`, all [B, L]; `token` maps an id to
    its piece. A replaced token reads `original→replacement`; the number behind each token is the
    discriminator's probability in percent that it was replaced.
    """
    return [_sentence(batch["input_ids"][row], batch["piece_ids"][row], seen["input_ids"][row], seen["labels"][row],
                      seen["probabilities"][row], token, max_tokens) for row in range(min(count, len(seen["labels"])))]


def _sentence(original, piece_ids, ids, labels, probabilities, token, max_tokens: int) -> Text:
    places = np.flatnonzero(piece_ids == 1)[1:max_tokens]
    marked = any(token(int(i)).startswith(_SPACE) for i in original[places])
    text = Text()
    for i in places:
        if text:
            text.append(" ")
        word = _readable(token(int(original[i])), marked)
        if labels[i]:
            text.append(f"{word}→{_readable(token(int(ids[i])), marked)}", "bold red")
        else:
            text.append(word)
        # Colour by what the discriminator believes, so that hits and misses show at a glance.
        text.append(f"·{100 * probabilities[i]:.0f}", "yellow" if probabilities[i] > 0.2 else "dim")
    return text


def _readable(piece: str, marked: bool) -> str:
    """Writes a SentencePiece (`marked` word starts) as WordPiece does: the word's start plain, the rest behind ##."""
    if not marked or piece.startswith("["):
        return piece
    return piece[1:] or _SPACE if piece.startswith(_SPACE) else f"##{piece}"


def print_examples(texts: list[Text]) -> None:
    """Writes the sentences to the terminal, wrapped to its width."""
    console = Console(highlight=False, soft_wrap=False)
    for text in texts:
        console.print(Text("  ") + text)
        console.print()
