"""Fuzzers: random cases of the whole library, each a function of a seed and its number alone.

``python -m tests.fuzz layers --cases 100000 --seed 7`` runs one of them, a module of this
package with ``run(cases, seed, start)``, which raises on the first fault and says the number of its
case. The suite runs a few hundred cases of each, ``make deep`` many.
"""
