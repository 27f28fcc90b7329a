"""Float64 NumPy transcriptions of every step rule, each from its paper: the judges of the library.

They import nothing of the library and no torch. A rule is two functions:

    init(theta, **hyper) -> state           arrays under torch's checkpoint keys
    step(theta, gradient, state, t, **hyper) -> new theta      t = 1, 2, 3, …

`step` replaces the arrays in `state` and never writes into `theta` or `gradient`. lbfgs, which
calls the function again, has `minimize`. Complex numbers are judged as pairs of real ones.
"""
