"""Words with which thirteen languages deny, contrast, report and ask.

Regular expressions in normalised spelling (`_normalize`), by language.
"""

from __future__ import annotations

DENIALS = {
    "ar": r"ليس\w*|لم|لن|غير|ما كان|لا",
    "de": r"nicht|kein\w*|nie|niemals|weder|noch nie|niemand\w*|nirgends|nichts",
    "el": r"δεν|δε|οχι|όχι|ποτέ|ποτε|ούτε|μην?|κανείς|πουθενά",
    "en": r"not|\w+n't|cannot|never|no|nor|neither|nobody|none|nowhere|nothing",
    "es": r"no|nunca|jamas|ni|tampoco|ningun\w*|nadie|nada",
    "fr": r"pas|jamais|ni|aucun\w*|non|nullement|rien|personne|nulle part",
    "hi": r"नहीं|न|ना|मत",
    "it": r"non|mai|nessun\w*|niente|nulla|neppure|neanche|nemmeno",
    "ja": (
        r"ではな|ではあり|でない|じゃな|ません|なかった|なく|ない|ておらず|ずに|免れ|誤り|間違い|"
        r"誤解|俗説"
    ),
    "ko": r"아니|않|없|못",
    "pt": r"nao|nunca|jamais|nem|nenhum\w*|tampouco|ninguem|nada",
    "ru": r"не|ни|никогда|нет|никак|никто|нигде|ничего|ничуть",
    "zh": r"不[是在属位由建曾]|[并並]不|[没沒]有|未[曾被]|从未|并没|非|不$",
}
"""Words that deny."""
CONTRASTS = {
    "ar": r"بدلا من|بدلاً من|على عكس|يظن|يعتقد الكثير",
    "de": (
        r"(?:an)?statt|(?:alles )?anders? als|alles andere als|entgegen|im gegensatz zu|"
        r"irrtumlich\w*|falschlich\w*|als (?:ob|ware\w*)|(?:viele|manche|oft|haufig|"
        r"manchmal) (?:glauben|denken|meinen|halten|sagen|behaupten|geglaubt|behauptet)|"
        r"verwechsel\w*"
    ),
    "el": r"αντί|σε αντίθεση|λανθασμένα|πολλοί (?:νομίζουν|πιστεύουν)",
    "en": (
        r"rather than|instead of|unlike|contrary to|as opposed to|(?:far from being|(?:is|are|was|"
        r"were) far from)|as (?:if|though)|mistaken\w*|wrongly|falsely|erroneously|(?:many|some|"
        r"most|people|visitors|tourists|you|often|once|long|commonly|popularly|sometimes|"
        r"frequently|widely) (?:\w+ )?(?:(?:might|may) )?(?:think|thinks|believe|believes|say|says|"
        r"assume|claim|suppose|imagine|thought|assumed|mistaken|confused|confuse|mistake)"
    ),
    "es": (
        r"en (?:vez|lugar) de|a diferencia de|al contrario de|erronea\w*|por error|como si|"
        r"confund\w*|(?:muchos|algunos|hay quien\w*|a menudo|la gente) (?:se )?(?:creen?|piensan?|"
        r"dicen?|afirman?)"
    ),
    "fr": (
        r"au lieu de|plutot que?|contrairement|a la difference|a tort|par erreur|comme si|"
        r"confond\w*|(?:beaucoup|certains|d'aucuns|on le|on la|on|souvent) (?:croient|croit|"
        r"pensent|pense|disent|imaginent|affirment)"
    ),
    "hi": r"के बजाय|गलती से",
    "it": (
        r"invece (?:di|che)|anziche|piuttosto che|a differenza|erronea\w*|per errore|come se|"
        r"confond\w*|(?:molti|alcuni|spesso si) (?:credono|crede|pensano|pensa|dicono|dice)"
    ),
    "ja": r"(?!)",
    "ko": r"(?!)",
    "pt": (
        r"em (?:vez|lugar) d\w+|ao (?:inves|contrario) d\w+|diferentemente d\w+|erronea\w*|"
        r"por engano|como se|confund\w*|(?:muitos|alguns|ha quem) (?:acreditam|acham|pensam|dizem|"
        r"ache|pense|diga)"
    ),
    "ru": (
        r"вместо|в отличие|вопреки|ошибочно|по ошибке|будто|многие (?:думают|считают|полагают)|"
        r"(?:часто|иногда|некоторые) (?:думают|считают|говорят|путают)|принято считать"
    ),
    "zh": r"(?:很多|许多|有些|有)人(?:以为|认为|误以为|说)|误以为|误认为|不同于|而不",
}
"""Words that contrast with the truth or report an opinion: rather than, as if, many believe."""
FALSEHOOD_WORDS = {
    "ar": r"خطأ|خاطئ|خرافة|غير صحيح",
    "de": r"falsch|mythos|irrtum|unwahr|irrglaube\w*",
    "el": r"μύθος|λάθος|ψευδές|ψέμα",
    "en": r"false|untrue|wrong|incorrect|myth|mistake|misconception|fiction|nonsense",
    "es": r"fals[oa]|mito|error|mentira|incorrecto|bulo",
    "fr": r"faux|fausse|mythe|erreur|inexact|idee recue",
    "hi": r"गलत|मिथक|झूठ",
    "it": r"fals[oa]|mito|errore|errat[oa]|leggenda metropolitana",
    "ja": r"誤り|間違い|誤解|俗説|嘘",
    "ko": r"거짓|오해|틀린",
    "pt": r"fals[oa]|mito|erro|mentira|incorreto|engano",
    "ru": r"миф|неправда|неверно|ошибк\w+|заблуждени\w+|ложь",
    "zh": r"错误|误解|谣言|误传|不对",
}
"""Nouns and adjectives that call a statement false: a myth, untrue."""
PSEUDO_DENIALS = {
    "ar": r"ليس فقط|لا تفوت\w*|لا شك",
    "de": (
        r"nicht (?:nur|allein|zuletzt|verpassen|entgehen|versaumen|vergessen|weit|unbedingt|"
        r"umsonst|der einzige|die einzige|das einzige)|(?:nie|nicht) (?:mehr )?(?:vollendet|"
        r"fertig\w*|erlebt\w*|gesehen)|kein (?:zweifel|wunder|geringerer)|nichts anderes als"
    ),
    "el": r"όχι μόνο|μη χάσετε|μην χάσετε|χωρίς αμφιβολία|δεν είναι μακριά",
    "en": (
        r"not (?:only|just|merely|simply|solely|far|to be missed|a myth|until|least|surprising\w*|"
        r"the only|alone)|(?:impossible|hard|why) not|no (?:doubt|wonder|less than|other than|"
        r"secret)|nothing (?:but|less than)|(?:(?:don't|do not|never|can't|cannot|must not|mustn't|"
        r"shouldn't|should not) (?:miss|forget|overlook|skip))|(?:did not|didn't|never) (?:live|"
        r"lived|see|saw|complete|completed|finish|finished|witness)|isn't (?:just|only|merely|"
        r"the only|far)|wasn't (?:just|only|until)"
    ),
    "es": (
        r"no (?:l[ao] (?:comenz|empez|termin|acab|vi)\w+|solo|solamente|unicamente|obstante|lejos|"
        r"muy lejos|hay duda|en vano|es (?:solo|el unico|la unica)|(?:te|se|os|lo|"
        r"la) (?:puedes? )?(?:pierd|perder|olvid)\w*|dejes?|dejen|olvides?|olvide)|sin duda|"
        r"nada menos|(?:imposible|dificil) no"
    ),
    "fr": (
        r"(?:non|pas) (?:seulement|uniquement|loin|que|le seul|la seule|un hasard|etonnant)|"
        r"(?:manquez|ratez|oubliez|manquer|rater) (?:pas|ni)|pas (?:manquer|rater|oublier)|"
        r"rien de moins|(?:impossible|difficile) de ne pas"
    ),
    "hi": r"न केवल|नहीं तो|न भूलें|न सिर्फ",
    "it": (
        r"non (?:solo|soltanto|lontano|perdere|perdetevi|perderti|perdetev\w*|dimenticare|mancate|"
        r"e (?:solo|l'unic\w)|a caso|c'e dubbio)|(?:impossibile|difficile) non"
    ),
    "ja": (
        r"だけで(?:は|も)?なく|のみならず|間違いなく|少なくとも|見逃せ\w*|欠かせません|欠かせない|"
        r"に違いない|過言ではありません|過言ではない|知らない人はいない|かもしれません|"
        r"はずせません|いうまでもなく"
    ),
    "ko": r"뿐만 아니라|뿐 아니라|놓치지 마|틀림없",
    "pt": (
        r"nao (?:so|apenas|somente|longe|perca|deixe|esqueca|ha duvida|e (?:so|apenas|o unico|"
        r"a unica)|a toa)|sem duvida|nada menos|(?:impossivel|dificil) nao"
    ),
    "ru": (
        r"не (?:только|просто|пропустите|забудьте|случайно|далеко|единственн\w+|упустите|менее|"
        r"столько)|нет сомнени\w+"
    ),
    "zh": (
        r"不仅|不僅|不但|不只|不要错过|不容错过|不可错过|非常|非凡|无非|不得不|并非只|不光|"
        r"毫无疑问|除非|非遗|非物质|非洲|莫非"
    ),
}
"""Phrases with a word of denial that deny nothing: not only, not far, do not miss."""
DOUBLE_DENIALS = {
    "de": r"(?:kein\w*|nicht|niemand)\b[^.]*?\b(?:ohne|bevor)",
    "en": r"(?:no|not|never|nobody|no one|\w+n't)\b[^.]*?\b(?:without|until|before)",
    "es": r"(?:no|nadie|ningun\w*|nunca)\b[^.]*?\b(?:sin|hasta)",
    "fr": r"(?:pas|personne|jamais|aucun\w*)\b[^.]*?\b(?:sans|avant)",
    "it": r"(?:non|nessun\w*)\b[^.]*?\b(?:senza|prima d\w+|fino a\w*)",
    "pt": r"(?:nao|ninguem|nenhum\w*|nunca)\b[^.]*?\b(?:sem|ate)",
    "ru": r"(?:не|никто|нельзя)\b[^.]*?\b(?:без|раньше|до)",
}
"""Two denials that make a statement, or a time until which it was not so."""
ALTERNATIVES = {
    "ar": r"أو|ولا",
    "de": r"oder|noch|und auch nicht",
    "el": r"ή|ούτε",
    "en": r"or|nor",
    "es": r"o|u|ni",
    "fr": r"ou|ni",
    "hi": r"या|न ही",
    "it": r"o|od|ne",
    "ja": r"や|または",
    "ko": r"나|또는",
    "pt": r"ou|nem",
    "ru": r"или|ни",
    "zh": r"或|也不",
}
"""Words that continue a denial or an invitation: nor, do not miss this nor that."""
TURNS = {
    "ar": r"بل|لكن|وإنما",
    "de": r"sondern|aber|jedoch|vielmehr",
    "el": r"αλλά|αλλα|όμως",
    "en": r"but|however|instead(?! of)|yet",
    "es": r"sino|pero",
    "fr": r"mais",
    "hi": r"बल्कि|लेकिन|परन्तु",
    "it": r"ma|bensi|pero",
    "ja": r"、|が、|しかし|(?<![でことに])は(?!な|あり)",
    "ko": r"하지만|라,|,",
    "pt": r"mas|e sim|porem",
    "ru": r"а|но|однако",
    "zh": r"而是|而|但",
}
"""Words at which a denial ends and the truth follows: but, however."""
CONJUNCTIONS = {
    "ar": r"(?!)",
    "de": r"und|weil|obwohl|wahrend",
    "el": r"και|επειδή",
    "en": r"and|because|since|while|although|though|so",
    "es": r"y|e|porque|aunque|mientras",
    "fr": r"et|parce|car|quoique",
    "hi": r"और|क्योंकि",
    "it": r"(?<!non )e|ed|perche|poiche|mentre",
    "ja": r"(?!)",
    "ko": r"(?!)",
    "pt": r"(?<!nao )e|porque|pois|embora",
    "ru": r"и|потому|хотя",
    "zh": r"因为|并且",
}
"""Words at which another clause begins, if more than the phrase follows."""
RELATIVES = r"that|which|who|whose|where|welche\w*|dass|qui|que|dont|che|cui|который|что"
"""Words that begin a clause which depends on the one before."""
PREPOSITIONS = {
    "en": (
        r"in|of|at|near|from|off|on|to|for|with|by|above|over|below|under|behind|beside|along|"
        r"around|outside|across|through|between"
    ),
    "es": r"en|de|del|a|al|por|con|para|cerca de|sobre|ante|bajo|entre|desde",
    "fr": r"en|a|au|aux|de|du|des|d'|dans|sur|pres de|par|sous|devant|entre|avec|pour",
    "it": r"in|a|di|d[ae]l\w*|n[e]l\w*|su\w*|per|con|sopra|sotto|tra|fra",
    "pt": r"em|n[oa]s?|de|d[oa]s?|por|para|com|sobre|sob|entre",
    "ru": r"в|во|на|из|у|около|под|для|с|над|перед|за|между",
    "el": r"στ\w+|από|για|με",
}
"""Prepositions; a noun after one is not the subject of what follows."""
CLAUSE_MARKS = r"(?:[,、，]|\s-\s)"
"""Punctuation marks at which another clause begins."""
AUXILIARY_DENIALS = {
    "en": (
        r"(?:did|do|does|was|were|is|are|has|had|have|can|could|would|will|should) (?:not|never)|"
        r"ha[ds] (?:no|nothing)|\w+n't|cannot|never"
    ),
}
"""Denials of the subject of an English sentence: in *Lisbon not Porto* Lisbon is not denied."""
UNSPACED = ("ja", "zh", "ko", "ar", "hi")
"""Languages whose words have no blank between them, or grow at both ends."""
VERB_LAST = ("hi", "ja", "ko")
"""Languages whose denial follows what it denies."""
RHETORICAL_QUESTIONS = {
    "ar": r"هل تعلم",
    "de": r"wuss?ten sie|wuss?test du|wissen sie|nicht wahr",
    "el": r"γνωρίζατε|ξέρατε",
    "en": r"did you know|do you know that|isn't it|(?<=, )right|don't you think|isn't that",
    "es": r"sabias|sabian|sabia usted|sabeis|sabes que",
    "fr": r"saviez-vous|sais-tu|savez-vous|n'est-ce pas|le saviez",
    "hi": r"क्या आप जानते",
    "it": r"lo sapev\w+|sapev\w+|sapete che|(?<=, )vero",
    "ja": r"ご存[知じ]|知っていま",
    "ko": r"아시나요|알고 계",
    "pt": r"sabia|voce sabia|sabias|(?<=, )(?:nao e|verdade)",
    "ru": r"знаете ли|знали ли|а вы знали|(?<=, )правда",
    "zh": r"你知道|您知道|知道吗",
}
"""Questions that state what they ask: did you know."""
