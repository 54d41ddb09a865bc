"""
The command `absorb`: parse, call, print.

A package of its own beside `absorb_plugin`, and not inside it: importing anything of
`absorb_plugin` registers the modifier, which imports llm-compressor and takes seconds,
and `absorb --help` shall answer at once. So nothing here imports `absorb_plugin`, torch
or transformers outside a command. Only here are tables printed and options named.
"""
