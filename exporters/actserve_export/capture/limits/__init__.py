"""Limits of a captured policy.

signature.py   a limits file and a signature -> the signature with `Limits`
flags.py       booleans of items and of their elements
outputs.py     what the limits do to one output of one step
step.py        one step of a policy with limits: its outputs and its state
policy.py      a captured policy -> a captured policy with limits
"""
