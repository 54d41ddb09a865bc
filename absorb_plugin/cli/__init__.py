"""
The command `absorb`: parse, call, print. Nothing here imports torch, transformers or
llm-compressor outside a command, so that `absorb --help` answers at once. Only here are
tables printed and options named.
"""
