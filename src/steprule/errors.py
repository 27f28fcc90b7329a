"""Every message a user can see, on one page: who, what was given, what is allowed, what to do, where."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

# Arguments of `split` that people give to a rule.
OF_SPLIT = ("views", "where")


def close(name: str, allowed: Iterable[str]) -> str | None:
    """The nearest right name, if one is near."""
    return next(iter(difflib.get_close_matches(name, list(allowed), 1)), None)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A closing sentence: the nearest right name, or all of them."""
    allowed = sorted(allowed)
    near = close(name, allowed)
    if near:
        return f"Did you mean '{near}'?"
    return f"Allowed are: {', '.join(allowed)}." if allowed else ""


def counted(number: int, noun: str) -> str:
    """`1 parameter`, `2 parameters`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def in_group(group: int | None) -> str:
    """Where: empty for the constructor's own arguments, otherwise the parameter group."""
    return "" if group is None else f" (parameter group {group})"


# Hyper-parameters


def unknown_hyperparameter(who: str, name: str, allowed: Iterable[str], group: int | None = None):
    """A misspelt hyper-parameter, in the constructor or in a group, or an argument of `split`."""
    error = TypeError if group is None else ValueError
    fix = f"Give {name}=… to steprule.split." if name in OF_SPLIT else nearest(name, allowed)
    return error(f"{who} has no hyper-parameter '{name}'{in_group(group)}. {fix}".rstrip())


def misspelt_key(who: str, key: str, meant: str, group: int | None):
    """A group key that is nearly a hyper-parameter."""
    return ValueError(
        f"{who} has no hyper-parameter '{key}'{in_group(group)}. Did you mean '{meant}'? If it is a note of "
        "your own, give it another name."
    )


def no_weight_decay(who: str, given: object, group: int):
    """A weight decay in a group of a rule that has none."""
    return ValueError(
        f"{who} has no weight decay: weight_decay = {given!r} would do nothing{in_group(group)}. Set it to 0, "
        "or use a rule that decays weights."
    )


def out_of_range(who: str, what: str, given: object, allowed: str, group: int | None = None):
    """A hyper-parameter outside its range."""
    return ValueError(f"{who}: {what} = {given!r}, must be {allowed}{in_group(group)}.")


def wrong_type(who: str, what: str, given: object, allowed: str, group: int | None = None):
    """A hyper-parameter of the wrong type."""
    return TypeError(f"{who}: {what} = {given!r}, must be {allowed}{in_group(group)}.")


def tensor_not_one_element(who: str, what: str, shape: object, group: int | None = None):
    """A tensor hyper-parameter that does not have exactly one element."""
    return ValueError(
        f"{who}: Tensor {what} must be 1-element, got shape {tuple(shape)}"  # type: ignore[call-overload]
        f"{in_group(group)}. Give one number per parameter group."
    )


def mixed_betas(who: str, group: int | None = None):
    """One beta a float, the other a tensor."""
    return ValueError(f"{who}: betas must be either both floats or both Tensors{in_group(group)}.")


def contradiction(who: str, first: str, second: str, fix: str, error: type[Exception] = ValueError):
    """Two arguments that exclude each other."""
    return error(f"{who}: {first} does not go with {second}. {fix}")


# Evaluation


def step_in_evaluation(who: str):
    """A step while the model has the weights to evaluate with."""
    return RuntimeError(
        f"{who}.step: the model has the weights to evaluate with. Call optimizer.train() before you train."
    )


def nothing_climbs(who: str):
    """`climb` of an optimizer without SAM."""
    return RuntimeError(f"{who}.climb: no group has a modifier that climbs, such as modifiers=[SAM()].")


def climb_first(who: str):
    """A step of SAM that has only one gradient."""
    return RuntimeError(
        f"{who}.step: SAM needs the gradient twice. Give step a closure that computes the loss and its "
        "gradients, or call optimizer.climb() after the first backward pass and step() after the second."
    )


def reshaped_uphill(who: str, name: str, before: Iterable[int], now: Iterable[int]):
    """Weights to put back after a climb whose parameter has another shape now."""
    return RuntimeError(
        f"{who}: {name} had the shape {tuple(before)} at climb() and has {tuple(now)} now, so its weights "
        "cannot be put back; it stays as it is. Change shapes after step(), not between climb() and step()."
    )


def nothing_measured(who: str):
    """`metrics` of an optimizer that measures nothing."""
    return RuntimeError(f"{who}: metrics() needs modifiers=[Metrics()], which is in no group.")


def no_gradient_norm(who: str):
    """`gradient_norm` of an optimizer that does not compute it."""
    return RuntimeError(f"{who}: gradient_norm needs modifiers=[GlobalNormClip(...)], which is in no group.")


def not_constructed(who: str, name: str):
    """An optimizer whose own `__init__` has not called that of its base."""
    return AttributeError(
        f"{who} has no {name} yet: its __init__ must first call super().__init__(params, …), which makes the "
        "parameter groups."
    )


# Parameters and groups


def function_for_params(who: str, name: str):
    """`Adam(model.parameters)` in place of `Adam(model.parameters())`."""
    return TypeError(f"{who}: params is a function, {name}. Call it: {name}().")


def bare_tensor(who: str, kind: str):
    """`Adam(weight)` in place of `Adam([weight])`."""
    return TypeError(
        f"{who}: params must be an iterable of tensors, (name, tensor) pairs or dicts, or a module, "
        f"got one {kind}. Put it in a list: {who}([weight])."
    )


def no_parameters(who: str):
    """An empty parameter list."""
    return ValueError(
        f"{who} got an empty parameter list. Was a generator used up before, is everything frozen, "
        "or are the parentheses of model.parameters() missing?"
    )


def group_not_dict(who: str, kind: str):
    """A parameter group that is not a dict."""
    return TypeError(f"{who}: a parameter group must be a dict with 'params', got {kind}.")


def group_without_params(who: str, group: int):
    """A parameter group without its parameters."""
    return ValueError(f"{who}: parameter group {group} has no 'params'.")


def unordered_params(who: str):
    """A set of parameters, whose order changes from run to run."""
    return TypeError(
        f"{who}: params is a set, whose order changes between runs, so that a checkpoint could not be "
        "matched. Use a list."
    )


def not_a_tensor(who: str, kind: str, place: int, group: int):
    """Something among the parameters that is not a tensor."""
    return TypeError(
        f"{who} can only optimize tensors, but parameter {place} is {kind} (parameter group {group})."
    )


def not_a_leaf(who: str, name: str, group: int):
    """A computed tensor among the parameters."""
    return ValueError(
        f"{who} can't optimize a non-leaf Tensor: {name} (parameter group {group}) is the result of an "
        "operation. Pass the parameter itself; wrap a single one in a list."
    )


def names_missing(who: str, group: int):
    """Some parameters with names, some without."""
    return ValueError(
        f"{who}: some parameters of parameter group {group} have names and some do not. Name all of "
        "them, as named_parameters() does, or none."
    )


def groups_named_differently(who: str, group: int, named: bool):
    """One group with names, another without."""
    this, others = ("with", "without") if named else ("without", "with")
    return ValueError(
        f"{who}: parameter group {group} comes {this} names, the others {others}. Name the parameters "
        "of all groups or of none."
    )


def in_two_groups(who: str, names: str, group: int):
    """A parameter that another group already holds."""
    return ValueError(
        f"{who}: some parameters appear in more than one parameter group: {names} "
        f"(parameter group {group}). Tied weights belong to one group only."
    )


def duplicate_parameters(who: str, names: str, group: int) -> str:
    """The warning for a parameter that is in one group twice."""
    return (
        f"{who}: a parameter group with duplicate parameters: {names} (parameter group {group}). "
        "Each is updated once per step."
    )


# Gradients and steps


def sparse_gradient(who: str, name: str, alternative: str = "SparseAdam"):
    """A rule without a sparse form got a sparse gradient."""
    return RuntimeError(
        f"{who} needs dense gradients, got a sparse one for {name}. Use {alternative} for that "
        "parameter, or Embedding(sparse=False)."
    )


def sparse_with_option(who: str, option: str, name: str):
    """An option that has no meaning for the rows a sparse gradient leaves out."""
    return RuntimeError(
        f"{who}: {option} is not compatible with the sparse gradient of {name}: it would have to touch "
        f"every row. Set {option}=0 for that group, or use Embedding(sparse=False)."
    )


def dense_gradient(who: str, name: str):
    """A rule for sparse gradients got a dense one."""
    return RuntimeError(
        f"{who} needs sparse gradients, got a dense one for {name}. Use Adam for that parameter, or "
        "Embedding(sparse=True)."
    )


def complex_parameter(who: str, name: str, error: type[Exception] = RuntimeError):
    """A rule without a complex form got a complex parameter."""
    return error(f"{who} does not support complex parameters, got one: {name}. Optimize torch.view_as_real(x).")


def closure_missing(who: str):
    """A rule that calls the loss again, without a closure."""
    return TypeError(
        f"{who}.step needs a closure that computes the loss and its gradients:\n"
        "    def closure():\n"
        "        optimizer.zero_grad(); loss = loss_fn(); loss.backward(); return loss\n"
        "    optimizer.step(closure)"
    )


def gradient_of_other_size(who: str, name: str, given: object, wanted: object):
    """A gradient that cannot be broadcast to its parameter."""
    return RuntimeError(
        f"{who}: the gradient of {name} has size {given}, must be {wanted} like the parameter. "
        "Was the parameter replaced after the backward pass? Call zero_grad() and backward() again."
    )


def gradient_elsewhere(who: str, name: str, given: object, wanted: object):
    """A gradient on another device than its parameter."""
    return RuntimeError(
        f"{who}: the gradient of {name} is on {given}, must be on {wanted} like the parameter. "
        "Expected all tensors to be on the same device: call zero_grad() after moving the model."
    )


def complex_gradient(who: str, name: str):
    """A complex gradient of a real parameter."""
    return RuntimeError(f"{who}: the gradient of {name} is complex, must be real like the parameter.")


def nothing_to_add(who: str, name: str):
    """A meta or fake tensor where a rule takes sums."""
    return RuntimeError(
        f"{who}: {name} is a meta or fake tensor, which has no elements, but a step takes a sum over them. "
        "Give the model memory first, as with model.to_empty(device=...), or step a rule without sums."
    )


def state_does_not_fit(who: str, name: str, problem: str, fix: str):
    """State that does not fit the parameter as it is now."""
    return RuntimeError(f"{who}: {name} cannot be stepped: {problem}. To continue, {fix}.")


def in_the_middle_of_a_step(who: str) -> str:
    """A note on an error that could not be found in advance."""
    return (
        f"{who}: this was raised in the middle of a step. Parameters before this one may have moved already: "
        "load a checkpoint of the model and the optimizer before you continue."
    )


def parameter_not_writable(who: str, name: str, problem: str, fix: str):
    """A parameter that torch cannot write to in place."""
    return RuntimeError(f"{who}: {name} {problem}. {fix}")


def runner_unavailable(who: str, asked: str, reason: str):
    """A runner asked for by name that cannot run here."""
    return RuntimeError(f"{who}: {asked} is not available: {reason}.")


def captured_counts(who: str):
    """A CUDA graph would repeat the step with the same step count forever."""
    return RuntimeError(
        f"{who}: a CUDA graph is being captured, but step counts and scalars are on the host. "
        "Give capturable=True, or fused=True."
    )


def groups_differ(who: str, name: str, one: object, other: object):
    """Groups with different values of what a slot for all parameters is made of."""
    return ValueError(
        f"{who}: {name} is {one} in parameter group 0 and {other} in another, but a slot for all parameters "
        "(per='all') is made of it. Give all groups the same value."
    )


def captured_rhythm(who: str, modifier: str, every: int):
    """A CUDA graph would repeat the step with the modifier, or without it, forever."""
    return RuntimeError(
        f"{who}: a CUDA graph is being captured, but {modifier} acts in one of {every} steps only, and the "
        f"host decides in which. Step outside of the graph, or leave {modifier} out."
    )


def captured_sums(who: str):
    """A CUDA graph would repeat the step with the same sum over all parameters forever."""
    return RuntimeError(
        f"{who}: a CUDA graph is being captured, but the rule takes a sum over several parameters, which "
        "passes through the host. Step outside of the graph."
    )


# Checkpoints


def checkpoint(who: str, problem: str, fix: str = ""):
    """A checkpoint that does not fit; nothing was changed."""
    return ValueError(f"{who}.load_state_dict: {problem}. {fix}".rstrip())


def checkpoint_of_another_rule(who: str, writers: list[str], told: str):
    """A checkpoint that this rule did not write."""
    writer = " or ".join(sorted(writers))
    return checkpoint(
        who,
        f"this is a checkpoint of {writer}, not of {who}: {told}",
        "steprule.convert_state(state_dict, "
        f"from_='{min(writers)}', to='{who}') converts what both keep; it returns the new state and a report. "
        f"If another library's {who} wrote it, strict=False loads it.",
    )


def option_of_another_version(who: str, key: str, given: object, group: int):
    """An option of a newer torch in a checkpoint, switched on."""
    return checkpoint(
        who,
        f"{key} = {given!r} is an option of torch's {who} that this version does not have{in_group(group)}",
        "strict=False loads the rest and leaves it out.",
    )


def loaded_by_position(who: str, saved: str, current: str) -> str:
    """The warning for parameter names that are all different on the two sides."""
    return (
        f"{who}.load_state_dict: no parameter name in the checkpoint is known here (the first one there is "
        f"'{saved}', here '{current}'). Their number and shapes agree, so they were matched by position."
    )


def not_a_state_dict(who: str, kind: str):
    """Something else in place of a state dict."""
    return TypeError(f"{who}.load_state_dict takes the dict that optimizer.state_dict() returned, got {kind}.")


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Some names in a sentence: the first few, and how many more."""
    names = list(names)
    shown = names[:limit] if len(names) > limit + 1 else names
    text = ", ".join(shown)
    return f"{text} and {len(names) - len(shown)} more" if len(names) > len(shown) else text


def cannot_write(path: object, reason: object):
    """A file that could not be written; what was there before still is."""
    return OSError(f"cannot write {path}: {reason}. What was there before is kept.")


def damaged_file(path: object, reason: str):
    """A file that is no checkpoint, or no longer the one that was written."""
    return ValueError(f"{path} is damaged or not a checkpoint: {reason}. Use an earlier one.")


def unsafe_file(path: object, wanted: Iterable[str]):
    """A file that holds more than tensors and plain containers."""
    return ValueError(
        f"{path} was not loaded: it asks for {listed(wanted)}, and loading could run code. Checkpoints hold "
        "tensors, numbers, strings, and dicts, lists and tuples of them."
    )


def not_plain(path: object, wanted: Iterable[str]):
    """An object in a checkpoint that could not be loaded again without running code."""
    return TypeError(
        f"{path} was not written: it would hold {listed(wanted)}, which no safe loader accepts. Checkpoints "
        "hold tensors, numbers, strings, and dicts, lists and tuples of them; save an object's state_dict()."
    )


def nonfinite_gradients(who: str, names: Iterable[str], what: str = "gradient"):
    """NaN or infinite gradients, where the user asked for an error."""
    names = list(names)
    what = f"the {what}s of" if len(names) > 1 else f"the {what} of"
    verb = "are" if len(names) > 1 else "is"
    return RuntimeError(
        f"{who}: {what} {listed(names)} {verb} NaN or infinite; nothing was moved. Look for the cause in "
        "the loss or a large lr, clip the gradients, or skip such steps with nonfinite='skip'."
    )


def not_convertible(problem: str, fix: str):
    """A state that cannot be converted from one rule to another."""
    return ValueError(f"convert_state: {problem}. {fix}")


# The catalogue


def no_such_rule(name: str, near: str | None, rules: Sequence[str]):
    """A name that no rule has."""
    hint = f"Did you mean '{near}'?" if near else f"The rules are {', '.join(rules)}."
    return ValueError(f"there is no rule '{name}'. {hint}")


def no_rule(module: str, name: str):
    """Something that is not a rule of this library."""
    return TypeError(
        f"{module}.{name} is not a rule of steprule. Give one of its classes, an optimizer made from one, or a "
        "name such as 'AdamW'."
    )


# Single rules


def not_dense(who: str, name: str):
    """A sparse tensor as a parameter."""
    return ValueError(
        f"{who} requires dense parameter tensors (only gradients may be sparse), but {name} is sparse."
    )


def not_a_matrix(who: str, name: str, shape: tuple[int, ...], group: int | None):
    """A vector or a higher-dimensional tensor for a rule on matrices."""
    return ValueError(
        f"{who} only supports 2D parameters, but {name} has shape {shape}{in_group(group)}. {who}(model) steps "
        "all but hidden matrices with AdamW; `views` in a group says how matrices lie in other parameters."
    )


# Closures and schedules


def closure_without_loss(who: str, given: str):
    """A closure that does not return the loss."""
    return TypeError(
        f"{who}.step: the closure returned {given}, must return the loss as one number. "
        "End it with `return loss`."
    )


def unknown_line_search(who: str, given: object, allowed: Iterable[object], group: int | None):
    """A line search that does not exist; torch's error for it has this type, too."""
    listed_ones = ", ".join(map(repr, allowed))
    return RuntimeError(f"{who}: line_search_fn = {given!r}, must be one of {listed_ones}{in_group(group)}.")


def one_group_only(who: str):
    """A second parameter group for a rule that sees all parameters as one vector."""
    return ValueError(
        f"{who} doesn't support per-parameter options (parameter groups): it treats all parameters as one "
        f"vector. Pass them in one list, or use a second {who} or another rule for some of them."
    )


def loss_not_finite(who: str, when: str) -> str:
    """The warning for a loss that is NaN or infinite."""
    return (
        f"{who}: the loss or its gradient was NaN or infinite {when}. The history is emptied. Lower lr, use "
        "line_search_fn='strong_wolfe', or look for the cause in what the closure computes."
    )


# Storage


def no_slot_to_store(who: str, key: str, slots: Iterable[str], group: int | None):
    """`state_dtype` names a slot that the rule does not have."""
    return ValueError(
        f"{who}: state_dtype names '{key}', which is not a slot of {who}{in_group(group)}. "
        f"{nearest(key, slots)}"
    )


def not_to_be_kept_so(who: str, key: str, kind: str, reason: str, instead: str, group: int | None):
    """A slot that so few bits would spoil."""
    return ValueError(f"{who}: '{key}' cannot be kept in {kind}: {reason}{in_group(group)}. Use {instead}.")


def sparse_with_reduction(who: str, name: str):
    """A rule that needs all elements of a tensor, and a gradient with only some of its rows."""
    return RuntimeError(
        f"{who} takes mean, norm or largest of whole tensors, but the sparse gradient of {name} has only some "
        "rows. Use Embedding(sparse=False)."
    )


def sparse_with_codes(who: str, name: str):
    """A sparse gradient's rows cannot be stepped alone if neighbours share a scale."""
    return RuntimeError(
        f"{who}: state_dtype='int8' does not go with the sparse gradient of {name}: "
        "neighbours share a scale and would change too. Use bf16 for that group, or Embedding(sparse=False)."
    )


def rounding_has_no_tape(who: str, given: str, group: int | None):
    """Storage that rounds, in a step that autograd should follow."""
    return ValueError(
        f"{who}: differentiable=True does not go with {given}{in_group(group)}: autograd cannot follow its "
        "rounding. Use fp32."
    )


def matrix_in_parts(who: str, name: str, group: int | None):
    """A DTensor that is split over processes, for a rule whose step needs all of it."""
    error = RuntimeError if group is None else ValueError
    return error(
        f"{who}: {name}{in_group(group)} is a DTensor that is split over processes, and {who} needs the whole "
        "tensor in each. Keep it replicated, or give it to a rule that works element by element, such as AdamW."
    )


def not_an_optimizer(function: str, given: str):
    """Something else in place of an optimizer of this library."""
    return TypeError(f"{function} takes an optimizer of steprule, got {given}.")


def only_bfloat16(who: str, low_precision: str, name: str, group: int):
    """A float16 parameter for storage that needs the exponent of float32."""
    return ValueError(
        f"{who}: low_precision='{low_precision}' needs bfloat16 parameters, but {name} is float16 (parameter "
        f"group {group}). Use low_precision='kahan', or bfloat16."
    )


def state_rounds_away(who: str, key: str, name: str, dtype: object, fraction: float) -> str:
    """The warning for state that a step divides by and that 16 bits turn into 0."""
    return (
        f"{who}: in the first step {fraction:.0%} of '{key}' of {name} ({dtype}) rounded to 0, and steps "
        "divide by it. Use state_dtype='fp32' or 'bf16'."
    )


def older_file(path: object, reason: str):
    """A file in the format that torch wrote before its version 1.6, with something in it that is not plain."""
    return ValueError(
        f"{path} is in torch's older format and could not be read safely: {reason}. Load it where it was "
        "written, and save it again."
    )


def updates_round_away(who: str, name: str, dtype: object, fraction: float) -> str:
    """The warning for 16-bit parameters that hardly move."""
    return (
        f"{who}: in the first step {fraction:.0%} of the updates of {name} ({dtype}) rounded away, so it will "
        "hardly learn. Use low_precision='kahan', 'stochastic' or 'master'; 'none' says that you want this."
    )
