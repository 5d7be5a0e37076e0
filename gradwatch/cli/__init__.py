"""The command line: ``gradwatch COMMAND``, one file for each command."""
