"""The commands of `smmufast`, a file each; `smmufast.cli` puts them together.

A file has `add(command)`, which adds its command with its options and names what runs it
(`set_defaults(run=...)`); that returns the exit status.  What needs numpy or is compiled is
imported when a command runs, for --help needs none.
"""
