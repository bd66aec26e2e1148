"""The languages of texts that name none, told by the model in the wheel of py3langid."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

SURE = 0.9
"""Probability above which a text alone decides which languages there are."""
NO_LANGUAGE = "und"
"""Code of a text whose language nobody can tell."""
TEXTS_AT_ONCE = 4_096
"""Texts whose scores are held together."""
LETTERS_AT_ONCE = 1 << 22
"""Bytes of texts that are read in step."""
IN_STEP = 256
"""Fewest texts of like length that are faster in step than one after the other."""


def told_languages(texts: Mapping[str, str], known: Iterable[str] = ()) -> dict[str, str]:
    """Return the language of each text, an ISO 639 code; the same on every machine.

    Short texts look like many languages. So a text that does not decide by itself is in the most
    probable of the languages of those that do, and of the known ones.

    Args:
        texts: the texts by name.
        known: languages that other texts are in.
    """
    model = _model()
    names = list(texts)
    told: dict[str, str] = {}
    unsure: list[str] = []
    for first in range(0, len(names), TEXTS_AT_ONCE):
        block = names[first : first + TEXTS_AT_ONCE]
        scored = model.classified([texts[name] for name in block], model.labels)
        for name, (language, probability) in zip(block, scored, strict=True):
            told[name] = language
            if probability < SURE:
                unsure.append(name)
    sure = set(told.values()) if not unsure else {told[name] for name in {*names} - {*unsure}}
    codes = {language.partition("-")[0] for language in known}
    candidates = sorted((sure | codes) & set(model.labels))
    if not candidates:
        return dict.fromkeys(texts, NO_LANGUAGE)
    for first in range(0, len(unsure), TEXTS_AT_ONCE):
        block = unsure[first : first + TEXTS_AT_ONCE]
        scored = model.classified([texts[name] for name in block], candidates)
        told |= {name: language for name, (language, _) in zip(block, scored, strict=True)}
    return told


def can_be_told(language: str) -> bool:
    """Return whether texts can be told to be in a language, a code or tag as rows have it.

    Codes of three letters cannot, nor `und`.
    """
    return language.partition("-")[0] in _model().labels


@cache
def _model() -> _Model:
    """Return the model; lessons ask it block by block, and loading it takes most of a second."""
    return _Model()


class _Model:
    """The model of py3langid, for many texts at once: the library takes them one by one.

    It is a naive Bayes classifier of byte n-grams, which an automaton finds.
    """

    def __init__(self) -> None:
        # Most texts name their language, so most runs need neither library nor model.
        import numpy as np  # noqa: PLC0415
        from py3langid.langid import MODEL_FILE, LanguageIdentifier  # noqa: PLC0415

        model: Any = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        self.labels: list[str] = model.labels
        """The codes of all languages."""
        self._classes: list[str] = model.nb_classes  # a language may have two
        self._weights = np.asarray(model.nb_ptc, dtype=np.float32)  # [features, classes]
        self._bias = np.asarray(model.nb_pc, dtype=np.float32)
        self._next = np.asarray(model.tk_nextmove)  # [rows x 256] -> state
        self._row = np.asarray(model.tk_row, dtype=np.intp) << 8
        self._feature = np.asarray(model.tk_output, dtype=np.intp)  # state -> feature, or -1

    def classified(
        self, texts: Sequence[str], languages: Sequence[str]
    ) -> Iterator[tuple[str, float]]:
        """Yield the most probable of some languages for each text, and its probability."""
        import numpy as np  # noqa: PLC0415

        encoded = [_encoded(text) for text in texts]
        columns = [k for k, label in enumerate(self._classes) if label in set(languages)]
        every = len(columns) == len(self._classes)
        visits = self._visits(encoded)
        scores = visits @ (self._weights if every else self._weights[:, columns])
        scores[np.diff(visits.indptr) > 0] += self._bias[columns]
        # The root of the length keeps probabilities comparable between short and long texts.
        scores /= np.sqrt([[len(text) or 1] for text in encoded]).astype(np.float32)
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        odds /= odds.sum(axis=1, keepdims=True)
        labels = list(dict.fromkeys(self._classes[k] for k in columns))
        merged = np.zeros((len(texts), len(labels)), dtype=np.float32)
        for place, k in enumerate(columns):
            merged[:, labels.index(self._classes[k])] += odds[:, place]
        best = merged.argmax(axis=1)
        yield from zip((labels[k] for k in best), merged.max(axis=1).tolist(), strict=True)

    def _visits(self, texts: Sequence[bytes]) -> Any:
        """Return log(1 + how often each feature is in each text), [texts, features], sparse."""
        import numpy as np  # noqa: PLC0415
        from scipy.sparse import coo_array  # noqa: PLC0415

        rows, features = [], []
        for block in _blocks(texts):
            read = self._in_step if len(block) >= IN_STEP else self._one_by_one
            numbers = np.asarray(block, dtype=np.intp)
            for places, found in read([texts[k] for k in block]):
                rows.append(numbers[places])
                features.append(found)
        none = np.zeros(0, dtype=np.intp)
        where = (np.concatenate([none, *rows]), np.concatenate([none, *features]))
        ones = np.ones(len(where[0]), dtype=np.float32)
        counts = coo_array((ones, where), shape=(len(texts), len(self._weights))).tocsr()
        counts.data = np.log1p(counts.data)
        return counts

    def _in_step(
        self, texts: Sequence[bytes]
    ) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Yield which texts have a feature that ends at a byte, and the features, byte by byte.

        Args:
            texts: the longest first.
        """
        import numpy as np  # noqa: PLC0415

        longest = len(texts[0])
        padded = b"".join(text.ljust(longest, b"\0") for text in texts)
        letters = np.frombuffer(padded, dtype=np.uint8).reshape(len(texts), longest).T.copy()
        lengths = np.array([-len(text) for text in texts])
        states = np.zeros(len(texts), dtype=np.intp)
        for place in range(longest):
            reading = int(np.searchsorted(lengths, -place))  # those that are longer
            states = self._next[self._row[states[:reading]] + letters[place, :reading]]
            found = self._feature[states]
            hits = np.flatnonzero(found >= 0)
            yield hits, found[hits]

    def _one_by_one(
        self, texts: Sequence[bytes]
    ) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Yield the same, text by text."""
        import numpy as np  # noqa: PLC0415

        following, row, feature = self._next, self._row, self._feature
        for number, text in enumerate(texts):
            state, found = 0, []
            for letter in text:
                state = following[row[state] + letter]
                if feature[state] >= 0:
                    found.append(feature[state])
            yield np.full(len(found), number, dtype=np.intp), np.asarray(found, dtype=np.intp)


def _blocks(texts: Sequence[bytes]) -> Iterator[list[int]]:
    """Yield the places of texts in blocks of like lengths, the longest first."""
    order = sorted(range(len(texts)), key=lambda k: -len(texts[k]))
    while order:
        size = max(LETTERS_AT_ONCE // max(len(texts[order[0]]), 1), 1)
        yield order[:size]
        order = order[size:]


def _encoded(text: str) -> bytes:
    """Return a text as the model reads it: composed, and in lower case if it is all in upper."""
    lower = text.lower() if text.isupper() else text
    return unicodedata.normalize("NFC", lower).encode(errors="surrogatepass")
