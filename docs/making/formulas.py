"""Formulas as they stand in docstrings, in Unicode, as LaTeX."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["latex", "lines_of"]

_LETTERS = "αβγδεζηθλμνξπρστψΔΠΣ"
_NAMES = "alpha beta gamma delta varepsilon zeta eta theta lambda mu nu xi pi rho sigma tau psi Delta Pi Sigma"
_GREEK = dict(zip(_LETTERS, _NAMES.split(), strict=True))
_SYMBOLS = {
    "·": r"\cdot ", "←": r"\leftarrow ", "⊙": r"\odot ", "⟨": r"\langle ", "⟩": r"\rangle ", "‖": r"\| ",
    "≥": r"\ge ", "≤": r"\le ", "±": r"\pm ", "~": r"\sim ", "∞": r"\infty ", "½": r"\tfrac{1}{2}",
    "¼": r"\tfrac{1}{4}", "⅓": r"\tfrac{1}{3}", "%": r"\bmod ", ":": "{:}", "<": r"\lt ", ">": r"\gt ",
}  # fmt: skip
_UP = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ᵗⁿᵏᵈᵀʳᵖ", "0123456789+-tnkdTrp", strict=True)) | {"ᵀ": r"\top "}
_DOWN = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₜᵢᵣ", "0123456789+-tir", strict=True))
_MARKS = {"\u0302": r"\hat", "\u0304": r"\bar"}
_FUNCTIONS = {"max", "min", "cos", "exp", "ln"}
_OPERATORS = {"RMS", "atan2", "clip", "mean", "orthogonalize", "qr", "rowmean", "sign", "triu"}
_QUANTITIES = {"lr", "ax"}
# Products of matrices and vectors that are written without a dot.
_PRODUCTS = {"Hz", "UV", "USV"}

_TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<quoted>"[^"]*")
    |(?P<code>[A-Za-z]\w*=(?:True|False|\d+)|[A-Za-z]+_[A-Za-z]\w*|[A-Za-z]{2,}_\w+)
    |(?P<word>[A-Za-z]{2,}\d?(?:[-'’][A-Za-z]+)*)
    |(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)
    |(?P<letter>[A-Za-zΑ-Ωα-ω](?:[\u0302\u0304])?\d?)
    |(?P<up>[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ᵗⁿᵏᵈᵀʳᵖ]+)
    |(?P<down>[₀₁₂₃₄₅₆₇₈₉₊₋ₜᵢᵣ]+|_[A-Za-zΑ-Ωα-ω])
    |(?P<root>[√∛])
    |(?P<power>\^)
    |(?P<open>[(\[])
    |(?P<close>[)\]])
    |(?P<other>.)""",
    re.VERBOSE,
)  # fmt: skip


class _Token(NamedTuple):
    kind: str
    text: str


def lines_of(formula: str) -> Iterator[tuple[int, list[str]]]:
    """The lines of a formula: how far each is indented, and its statements, with two spaces or more between."""
    for line in formula.splitlines():
        if line.strip():
            yield len(line) - len(line.lstrip()), re.split(r"\s{2,}", line.strip())


def latex(statement: str) -> str:
    r"""A statement as LaTeX. Words become text; no fraction is guessed: / stays.

    >>> print(latex("θ ← θ - √(1-β2ᵗ)/(1-β1ᵗ) · m"))
    \theta \leftarrow \theta -\sqrt{1-\beta _{2}^{t}}/(1-\beta _{1}^{t})\cdot m
    >>> print(latex("else: no change"))
    \text{else: no change}
    """
    return _Writer(_tokens(statement)).all()


def _tokens(statement: str) -> list[_Token]:
    text = "".join(
        unicodedata.normalize("NFD", x) if unicodedata.decomposition(x)[:1] != "<" else x for x in statement
    )
    found = [_Token(str(match.lastgroup), match[0]) for match in _TOKEN.finditer(text)]
    return [_prose(found, place) for place in range(len(found))]


def _prose(tokens: list[_Token], place: int) -> _Token:
    """The token; a word that is not a name in the formula is prose, and so is an article."""
    token = tokens[place]
    if token.kind == "word":
        known = token.text in _FUNCTIONS | _OPERATORS and _next_text(tokens, place) in ("(", "²", "_")
        known = known or token.text in _FUNCTIONS | _QUANTITIES | _PRODUCTS
        return _Token("name" if known else "prose", token.text)
    if token.text == "a" and _kind(tokens, place + 2) in ("word", "code"):
        before = tokens[place - 1].text if place else ""
        is_article = before == "(" or (_kind(tokens, place - 2) == "word" and before == " ")
        return _Token("prose" if is_article else "letter", token.text)
    return token


def _next_text(tokens: list[_Token], place: int) -> str:
    return tokens[place + 1].text[:1] if place + 1 < len(tokens) else ""


def _kind(tokens: list[_Token], place: int) -> str:
    return tokens[place].kind if 0 <= place < len(tokens) else ""


class _Writer:
    """Writes tokens one after the other."""

    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = tokens
        self._place = 0

    def all(self) -> str:
        parts: list[str] = []
        while self._place < len(self._tokens):
            parts.append(self._part())
        return "".join(parts).strip()

    def _peek(self) -> _Token:
        return self._tokens[self._place] if self._place < len(self._tokens) else _Token("end", "")

    def _take(self) -> _Token:
        token = self._peek()
        self._place += 1
        return token

    def _part(self) -> str:
        """The next thing with what is written above and below it."""
        if self._is_prose():
            return self._text()
        kind, text = self._take()
        if kind == "space":
            # A remark in brackets keeps its distance.
            remark = self._peek().kind == "open" and _kind(self._tokens, self._place + 1) == "prose"
            return r"\ " if remark else ""
        written = self._one(kind, text)
        if kind == "code" and self._peek().text == ":":
            self._place += 1
            written += r"\text{: }"
        if kind in ("letter", "name", "close", "number", "other"):
            written += self._scripts(text if kind == "letter" else "")
        return written

    def _one(self, kind: str, text: str) -> str:
        if kind == "root":
            return rf"\sqrt{'[3]' if text == '∛' else ''}{{{self._argument()}}}"
        if kind == "power":
            return rf"^{{{self._argument()}}}"
        if kind in ("up", "down"):
            return self._script(kind, text)
        if kind in ("quoted", "code"):
            return rf"\texttt{{{_escaped(text)}}}"
        if kind == "name":
            return _name(text)
        if kind == "letter":
            return _letter(text)
        return _SYMBOLS.get(text, text)

    def _scripts(self, letter: str) -> str:
        """What stands below and above the thing just written, in braces of their own."""
        down = letter[-1] if letter[-1:].isdigit() else ""
        up = ""
        while (token := self._peek()).kind in ("up", "down") or (letter and token.text == "∞"):
            self._place += 1
            if token.kind == "up":
                up += "".join(_UP[x] for x in token.text)
            elif token.text.startswith("_"):
                down += _letter(token.text[1:]).strip()
            else:
                down += "".join(_DOWN.get(x, r"\infty ") for x in token.text)
        return (f"_{{{down}}}" if down else "") + (f"^{{{up}}}" if up else "")

    def _script(self, kind: str, text: str) -> str:
        table, sign = (_UP, "^") if kind == "up" else (_DOWN, "_")
        return f"{sign}{{{''.join(table.get(x, x) for x in text.lstrip('_'))}}}"

    def _argument(self) -> str:
        """What a root or a power takes: what is in brackets, a function with its brackets, or one thing."""
        if self._peek().kind == "open":
            return self._inside()
        if self._peek().text in _FUNCTIONS:
            name = self._take().text
            return f"{_name(name)}({self._inside()})"
        if self._is_prose():
            return rf"\text{{{self._take().text}}}"
        kind, text = self._take()
        if kind == "letter":
            # √β2 takes the index, but √v² is not written.
            return _letter(text) + (f"_{{{text[-1]}}}" if text[-1].isdigit() else "")
        return self._one(kind, text)

    def _inside(self) -> str:
        """What stands between two brackets, without them."""
        self._take()
        parts: list[str] = []
        while self._peek().kind not in ("close", "end"):
            parts.append(self._bracket() if self._peek().kind == "open" else self._part())
        self._take()
        return "".join(parts)

    def _bracket(self) -> str:
        opening = self._peek().text
        inside = self._inside()
        closing = ")" if opening == "(" else "]"
        return f"{opening}{inside}{closing}" + self._scripts("")

    def _is_prose(self) -> bool:
        return self._peek().kind == "prose"

    def _text(self) -> str:
        """Words in a row, with the spaces and commas between and around them."""
        words = " " if self._place and self._tokens[self._place - 1].kind == "space" else ""
        while self._is_prose() or self._peek().kind == "space" or self._peek().text in (",", ";", ":", "."):
            words += " " if self._peek().kind == "space" else self._peek().text
            self._place += 1
        at_end = self._peek().kind == "end"
        return rf"\text{{{words.rstrip() if at_end else words}}}"


def _letter(text: str) -> str:
    name = rf"\{_GREEK[text[0]]} " if text[0] in _GREEK else text[0]
    mark = next((_MARKS[x] for x in text[1:] if x in _MARKS), "")
    return f"{mark}{{{name.strip()}}}" if mark else name


def _name(text: str) -> str:
    if text in _FUNCTIONS:
        return rf"\{text} "
    if text in _PRODUCTS:
        return text
    return rf"\mathrm{{{text}}}" if text in _QUANTITIES else rf"\operatorname{{{text}}}"


def _escaped(text: str) -> str:
    return text.replace("_", r"\_").replace("%", r"\%")
