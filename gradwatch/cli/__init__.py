"""The command line: ``gradwatch COMMAND``, with one file per command."""
