"""Files and options that no careful user would give: the command line must answer each with a message.

``python -m bench.fuzz`` draws a command, its options and one spoilt input per run, all from a seed, and runs it in a
forked process. See :mod:`.judging` for what counts as a finding.
"""
