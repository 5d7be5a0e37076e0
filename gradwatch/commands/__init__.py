"""The commands of the command line: each file adds one to the parser, and runs it."""
