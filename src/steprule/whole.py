"""Words on whole matrices: each is one function of torch, which steps see as one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from steprule import matrix_errors
from steprule.levels import SIDES
from steprule.values import Number

Form = Callable[..., str | None]


@dataclass(frozen=True)
class MatrixWord:
    """A function of torch on matrices that a rule may use as a word.

    function: gets tensors whose last two dimensions are the matrices', and plain numbers; it returns a tensor
    and changes none. An error that it raises gets the names of the parameters. form: of the forms of the
    matrices that it is given ("element", "transposed", "left", "right", …), the form of its result, or None
    if they do not fit. dtype: the name of the precision that its matrices are kept in on the way to it and
    back, if that is not the one that the step is computed in. never_raises: whatever the values are. Nothing
    is stored before all words that may raise are over, which takes memory.
    """

    name: str
    function: Callable[..., Any] = field(repr=False)
    form: Form = field(repr=False)
    dtype: str | None = None
    never_raises: bool = False

    def __call__(self, *operands: Any) -> Number:
        """The value that the word makes of these."""
        machine = next((x.machine for x in operands if isinstance(x, Number)), None)
        if machine is None:
            raise matrix_errors.no_matrix(self.name, operands)
        if not machine.on_matrices:
            raise matrix_errors.whole_matrices_in(machine.rule, self.name, vectors=False)
        levels = [x.level for x in operands if isinstance(x, Number)]
        form = self.form(*levels) if all(x in SIDES for x in levels) else None
        if form is None:
            raise matrix_errors.matrices_do_not_fit(self.name, levels)
        handles = tuple(x.handle if isinstance(x, Number) else x for x in operands)
        return Number(machine, machine.whole(self, handles, form))

    def made(self, tensors: Sequence[Any], form: str, shape: Sequence[int]) -> Any:
        """What the function makes of tensors and plain numbers.

        form: of the result. shape: of the matrices per element.

        Raises: WordFailed for whatever the function raises, ValueError for a result of another shape.
        """
        before = [x._version for x in tensors if _is_counted(x)]
        try:
            result = self.function(*tensors)
        except Exception as error:
            raise matrix_errors.WordFailed(self.name, error, moved=self.never_raises) from error
        if not hasattr(result, "mT"):
            raise matrix_errors.word_without_result(self.name, result)
        if before != [x._version for x in tensors if _is_counted(x)]:
            raise matrix_errors.word_that_changes(self.name)
        sizes = {"row": shape[-2], "column": shape[-1]}
        wanted = tuple(sizes[side] for side in SIDES[form])
        if tuple(result.shape[-2:]) != wanted:
            raise matrix_errors.word_of_other_shape(self.name, tuple(result.shape[-2:]), wanted)
        return result


def _is_counted(x: Any) -> bool:
    """Whether torch counts how often the elements of x are changed. A number may be a tensor, too."""
    return getattr(x, "ndim", 0) > 1 and not x.is_inference()


def like_the_first(first: str, *others: str) -> str:
    """The form of a result that has the form of the first matrix."""
    return first


def of_a_square(first: str) -> str | None:
    """The form of a result that is made of one square matrix."""
    return first if first in ("left", "right") else None


def of_product(a: str, b: str) -> str | None:
    """The form of a product of two matrices, or None if there is none."""
    (row, inner), (other, column) = SIDES[a], SIDES[b]
    found = (form for form, sides in SIDES.items() if sides == (row, column))
    return next(found) if inner == other else None


def _of_transposed(a: str) -> str:
    return {"element": "transposed", "transposed": "element"}.get(a, a)


def _product(a: Any, b: Any) -> Any:
    return a @ b


def _transposed(x: Any) -> Any:
    return x.mT


product = MatrixWord("@", _product, of_product, never_raises=True)
Number.product_of_matrices = product
transpose = MatrixWord("transpose", _transposed, _of_transposed, never_raises=True)


def matrix_word(
    function: Callable[..., Any] | None = None,
    *,
    form: Form = like_the_first,
    dtype: str | None = None,
    never_raises: bool = False,
) -> Any:
    """Make a word for rules on matrices of a function of torch: `@matrix_word` above it.

        @matrix_word
        def signs(x: torch.Tensor) -> torch.Tensor:
            return x.sign()

    The function gets matrices in the last two dimensions of tensors, several at once, and plain numbers. It
    must treat every matrix on its own, return a new tensor, and change nothing. form: of the forms of its
    matrices, that of its result; without it, that of the first. dtype, never_raises: as in `MatrixWord`.
    """

    def word(given: Callable[..., Any]) -> MatrixWord:
        return MatrixWord(given.__name__, given, form, dtype, never_raises)

    return word if function is None else word(function)
