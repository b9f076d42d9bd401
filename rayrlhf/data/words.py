"""Words of a text in any script, by Unicode segmentation.

Scripts without blanks (Chinese, Japanese, Thai, Khmer, Lao, Burmese) have no words that a rule could find without a dictionary.
Their units are characters with their marks (grapheme clusters), of which runs become overlapping pairs in `search_words`, as in
Lucene's CJK analyzer.
"""

import unicodedata
from itertools import pairwise

import regex

NO_BLANKS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Le}\p{Javanese}\p{Tibetan}ー"
_WORD = regex.compile(rf"(?:(?=[{NO_BLANKS}])\X)|(?:(?![{NO_BLANKS}])[\w\p{{M}}])+(?:[\p{{M}}]*)")
_RUN = regex.compile(rf"(?:(?=[{NO_BLANKS}])\X)+|(?:(?![{NO_BLANKS}])[\w\p{{M}}])+")
_UNSPACED = regex.compile(rf"[{NO_BLANKS}]")
_HAN = regex.compile(r"\p{Han}")
_LETTER = regex.compile(r"\p{L}")


def normalized(text: str) -> str:
    """Return text after NFKC normalization and case folding, with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words_of(text: str) -> list[str]:
    """Return the normalized words of a text, without punctuation.

    A word of a script without blanks is one character with its marks.
    """
    words: list[str] = _WORD.findall(normalized(text))
    return words


def search_words(text: str) -> list[str]:
    """Return the terms of a text for search.

    Words, and pairs of characters in scripts without blanks.
    """
    terms: list[str] = []
    for run in _RUN.findall(normalized(text)):
        if not _UNSPACED.match(run):
            terms.append(run)
            continue
        characters = regex.findall(r"\X", run)
        terms += [first + second for first, second in pairwise(characters)] or characters
    return terms


def han_share(text: str) -> float:
    """Return the share of Chinese characters among the letters of a text, in [0, 1]."""
    letters = _LETTER.findall(text)
    return len(_HAN.findall(text)) / len(letters) if letters else 0.0


def unspaced_share(texts: list[str]) -> float:
    """Return the share of letters that belong to a script without blanks, in [0, 1]."""
    letters = sum(len(_LETTER.findall(text)) for text in texts)
    return sum(len(_UNSPACED.findall(text)) for text in texts) / letters if letters else 0.0
