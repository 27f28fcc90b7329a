"""Every message about rules on whole matrices and about the words that they use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steprule.errors import listed
from steprule.levels import ONE_PER
from steprule.rule_errors import a_kind


class WordFailed(RuntimeError):
    """A word on whole matrices that raised an error, before `word_failed` says for which parameters.

    places: which parameters they are, of those that were worked on together. moved: whether other parameters
    may have moved before.
    """

    in_rule = ""  # its line in the rule would say less

    def __init__(self, word: str, error: Exception, moved: bool):
        super().__init__(f"{word}: {error}")
        self.word = word
        self.error = error
        self.moved = moved
        self.places: Sequence[int] = (0,)


def word_failed(who: str, failed: WordFailed, names: Sequence[str]) -> Exception:
    """The error that a word on whole matrices raised, with the parameters that it was about."""
    error, whose = failed.error, listed([names[place] for place in failed.places])
    given = error.args[0] if len(error.args) == 1 else None
    problem = given.partition("\n")[0].rstrip(".") if isinstance(given, str) else type(error).__name__
    text = f"{who}: {failed.word} of the matrices of {whose} failed: {problem}."
    text += "" if failed.moved else " No parameter has moved."
    if isinstance(given, str):
        error.args = (text,)
    else:
        error.add_note(text)
    return error


class NoMatrices(TypeError):
    """A word on whole matrices of a parameter that may be none."""


def whole_matrices_in(rule: str, word: str, vectors: bool):
    """A word on whole matrices where there are none."""
    if vectors:
        fix = "A vector or a single number is no matrix. Write what they do instead, after `if is_matrix(p):`."
        return NoMatrices(f"{rule}.update: {word} of a parameter that may be no matrix. {fix}")
    problem = f"{word} works on whole matrices, but here every element is on its own"
    return TypeError(
        f"{rule}.update: {problem}. Subclass steprule.declare.Matrix for a rule on whole matrices."
    )


def word_without_result(word: str, made: object):
    """A function of torch that a rule uses as a word, and that returns no tensor."""
    return TypeError(f"{word} made {a_kind(made)}, must be a tensor of matrices.")


def word_that_changes(word: str):
    """A function of torch that a rule uses as a word, and that changes what it is given."""
    return RuntimeError(
        f"{word} changed a tensor that it was given. Make a new one: x * 2 instead of x.mul_(2)."
    )


def word_of_other_shape(word: str, made: tuple[int, ...], wanted: tuple[int, ...]):
    """A function of torch that a rule uses as a word."""
    return ValueError(f"{word} made matrices of shape {made}, must be {wanted}: that is what its `form` says.")


def no_matrix(word: str, operands: Any):
    """A word on whole matrices that is given none."""
    given = ", ".join(map(a_kind, operands)) or "nothing"
    fix = "Matrices are p, g, slots and what is made of them."
    return TypeError(f"{word} is given {given}, not a matrix. {fix}")


def matrices_do_not_fit(word: str, levels: Sequence[str]):
    """A product of matrices whose sides differ, or a word on a value per row."""
    given = " and ".join(ONE_PER[x] for x in levels)
    fix = "The columns of the first matrix must be the rows of the second; `transpose` swaps them."
    return TypeError(f"{word} of matrices that do not fit: {given}. {fix}")
