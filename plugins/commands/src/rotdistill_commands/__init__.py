"""Verbs of the command line: plan, runs, show, diff, report, rm, check, chat."""
