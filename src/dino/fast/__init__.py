"""Fast twins of readable functions: the same arguments, values and gradients, by test. `runtime` alone chooses them."""
