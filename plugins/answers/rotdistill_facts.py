"""Which expected facts an answer names, and which known falsehoods it asserts: phrases in plain spelling, unless they are denied.

A coarse test by design: no model judges another. A phrase counts where it stands in a statement, not in a question, and where nothing in
its clause denies it. What it gets wrong on answers labelled by hand is listed in the README.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from rotdistill_wording import plain

if TYPE_CHECKING:
    from rotdistill_core.samples import Claim

DENIALS = {
    "ar": r"ليس\w*|لم|لن|غير|ما كان|لا",
    "de": r"nicht|kein\w*|nie|niemals|weder|anstatt|irrtumlich\w*|falschlich\w*",
    "el": r"δεν|δε|οχι|όχι|ποτέ|ποτε|ούτε",
    "en": r"not|\w+n't|cannot|never|no|nor|neither|rather than|instead of|unlike|contrary to|myth|mistaken\w*|wrongly|falsely|false|untrue",
    "es": r"no|nunca|jamas|ni|tampoco|en vez de|en lugar de|falso|erroneamente",
    "fr": r"pas|jamais|ni|aucun\w*|non|au lieu de|plutot que|contrairement|a tort|faux",
    "hi": r"नहीं|न|ना|मत",
    "it": r"non|mai|nessun\w*|invece di|anziche|falso|erroneamente",
    "ja": r"ではな|ではあり|でない|じゃな|ません|なかった|なく|誤り|間違い",
    "ko": r"아니|않|없|못",
    "pt": r"nao|nunca|jamais|nem|nenhum\w*|em vez de|ao inves de|falso|erroneamente",
    "ru": r"не|ни|никогда|нет|вместо|ошибочно",
    "zh": r"不是|并非|並非|不在|没有|沒有|并不|並不|未曾|并没|而非|不属于|不位于",
}  # fmt: skip
"""What denies, in plain spelling."""
ONLY = {
    "ar": r"ليس فقط|لا تفوت\w*",
    "de": r"nicht (?:nur|allein|zuletzt|verpassen|entgehen)",
    "el": r"όχι μόνο|μη χάσετε",
    "en": r"not (?:only|just|merely|far|to be missed)|(?:don't|do not|never) miss|no doubt|no less than|nothing but",
    "es": r"no (?:solo|solamente|obstante|(?:te|se|os) pierd\w+|dejes?|dejen)|sin duda",
    "fr": r"(?:non|pas) (?:seulement|uniquement|loin)|(?:manquez|ratez|manquer|rater) pas|pas (?:manquer|rater)",
    "hi": r"न केवल|नहीं तो|न भूलें",
    "it": r"non (?:solo|soltanto|lontano|perdere|perdetevi|perderti)",
    "ja": r"だけでなく|のみならず|間違いなく|少なくとも|見逃せません",
    "ko": r"뿐만 아니라|뿐 아니라|놓치지 마",
    "pt": r"nao (?:so|apenas|somente|longe|perca|deixe)",
    "ru": r"не (?:только|просто|пропустите)",
    "zh": r"不仅|不僅|不但|不只|不要错过|不容错过",
}
"""What looks like a denial and is none: not only, not far, do not miss."""
CLOSES = {"ja": r"なくて?、?", "ko": r"아니라|아니고"}
"""Denials behind what they deny: what follows them is said."""
TURNS = {
    "ar": r"بل|لكن|وإنما", "de": r"sondern|aber|jedoch|vielmehr", "el": r"αλλά|αλλα|όμως", "en": r"but|however|instead(?! of)",
    "es": r"sino|pero", "fr": r"mais", "hi": r"बल्कि|लेकिन|परन्तु", "it": r"ma|bensi|pero", "ja": r"、|が、|しかし",
    "ko": r"하지만|라,", "pt": r"mas|e sim|porem", "ru": r"а|но|однако", "zh": r"而是|但",
}  # fmt: skip
"""Where a denial ends and the truth follows."""
JOINS = (
    r"and|that|which|who|where|because|since|while|so|und|weil|dass|welche\w*|"
    r"et|qui|que|parce|y|e|porque|i|che|perche|και|и|который|что|потому"
)
"""Where another clause begins."""
STOPS = r"[!?;:।。！？；…\n]|\.(?=\s|$)"
UNSPACED = ("ja", "zh", "ko", "ar", "hi")
"""Languages whose words have no blank between them, or grow at both ends."""


class Judged(NamedTuple):
    """What one answer says."""

    named: tuple[str, ...]
    """The expected facts that it states."""
    asserted: tuple[str, ...]
    """The known falsehoods that it states."""


def judge(answer: str, facts: Iterable[Claim], falsehoods: Iterable[Claim], language: str) -> Judged:
    """Return which facts an answer in a language states, and which falsehoods."""
    text = plain(answer, language)
    return Judged(*(tuple(claim.what for claim in claims if states(text, claim, language)) for claims in (facts, falsehoods)))


def states(text: str, claim: Claim, language: str) -> bool:
    """Say whether a text in plain spelling states a claim: a phrase of it stands there, and is neither asked nor denied."""
    found = (hit for phrase in claim.any for hit in re.finditer(_pattern(phrase, language), text))
    return any(not _denied(text, hit.start(), hit.end(), language) for hit in found)


@cache
def _pattern(phrase: str, language: str) -> str:
    """Return the pattern of a phrase: whole numbers, whole Roman numerals, and words that begin where the phrase begins."""
    known = plain(phrase, language)
    bare = known.strip()
    head = r"(?<!\d)" if bare[:1].isdecimal() else r"(?<!\w)" if bare[:1].isalpha() and language not in UNSPACED else ""
    whole = known.endswith(" ") or (re.search(r"(?:^|[ .])[ivxlc]+$", bare) and not bare.endswith("."))
    tail = r"(?![\w])" if whole else r"(?![\d]|[.,]\d)" if bare[-1:].isdecimal() else ""
    return head + re.escape(bare) + tail


def _denied(text: str, start: int, end: int, language: str) -> bool:
    """Say whether what stands at `text[start:end]` is asked, or denied in its clause."""
    before = re.split(STOPS, text[:start])[-1]
    after, stop = re.split(STOPS, text[end:])[0], re.search(STOPS, text[end:])
    if stop and stop[0] in "?？":
        return True
    cue, only, turn = (rf"(?:{by.get(language, by['en'])})" for by in (DENIALS, ONLY, TURNS))
    if language not in UNSPACED:
        cue, only, turn = (rf"(?<!\w){each}(?!\w)" for each in (cue, only, turn))
    before = re.sub(r",[^,]{1,40},", " ", re.sub(only, " ", before))  # not, as many think, built ...
    before = re.split(rf"{turn}|{CLOSES.get(language, ',')}|,", before)[-1]
    after = re.split(rf"{turn}|[,、]|(?<!\w)(?:{JOINS})(?!\w)", re.sub(only, " ", after))[0]
    return bool(re.search(cue, before) or re.search(cue, after))
