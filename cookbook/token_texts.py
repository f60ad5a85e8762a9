"""The text of each token, for whoever shows sequences token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

PART = "\ufffd"  # what decoders write for bytes that are no whole character
LONGEST = 8  # tokens that one character may take


class TokenTexts:
    """Pieces that join to what the tokens decode to: [a, b, c] -> ["Hel", "lo", " 🙂"].

    A character of several tokens belongs to the last of them, and the others are "". `decode` is asked once per token
    of the vocabulary, so that thousands of sequences cost little.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._known: dict[int, str] = {}

    def __call__(self, tokens: Sequence[int]) -> list[str]:
        texts = list(self.pieces(tokens))
        if len(texts) > len(tokens):
            texts[-2:] = [texts[-1]]
        return texts

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """The same for tokens that are still coming, and a last piece where they end inside a character."""
        waiting: list[int] = []  # tokens of a character that is not whole yet
        for token in tokens:
            text = self._alone(token)
            if waiting or PART in text:
                waiting.append(token)
                text = self._decode(waiting)
                if text.endswith(PART) and len(waiting) < LONGEST:
                    text = ""
                else:
                    waiting = []
            yield text
        if waiting:
            yield self._decode(waiting)

    def _alone(self, token: int) -> str:
        """As it stands after another token: some tokenizers drop the space of the first one."""
        if token not in self._known:
            self._known[token] = self._decode([token, token])[len(self._decode([token])) :]
        return self._known[token]
