"""Verbs of the command line: plan, runs, show, diff, report, rm, check, chat.

The module of a verb loads neither torch nor transformers, so `--help` and completion stay fast. A
verb that needs them imports one heavy module, whose name begins with `_`, when it is called.
"""
