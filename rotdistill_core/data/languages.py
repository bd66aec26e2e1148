"""The languages of texts that name none, told by the model in the wheel of py3langid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

SURE = 0.9
"""Probability above which a text alone decides which languages there are."""
NO_LANGUAGE = "und"
"""Code of a text whose language nobody can tell."""


def told_languages(texts: Mapping[str, str], known: Iterable[str] = ()) -> dict[str, str]:
    """Return the language of each text, an ISO 639 code; the same on every machine.

    Short texts look like many languages. So a text that does not decide by itself is in the most
    probable of the languages of those that do, and of the known ones.

    Args:
        texts: the texts by name.
        known: languages that other texts are in.
    """
    # Loading the model takes most of a second, and most texts name their language.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # noqa: PLC0415

    model: Any = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    first = {name: model.classify(text) for name, text in texts.items()}
    sure = {str(language) for language, probability in first.values() if probability >= SURE}
    codes = {language.partition("-")[0] for language in known}
    candidates = sorted((sure | codes) & set(model.labels))
    if not candidates:
        return dict.fromkeys(texts, NO_LANGUAGE)
    model.set_languages(candidates)
    return {
        name: str(first[name][0] if first[name][1] >= SURE else model.classify(text)[0])
        for name, text in texts.items()
    }
