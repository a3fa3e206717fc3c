"""Budgets: one total of bits, shared out over the linears by what each of them can make of it."""
