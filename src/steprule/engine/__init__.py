"""How a rule is run: the optimizer's contract, the traced program, and the runners."""
