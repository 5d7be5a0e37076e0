"""What was written by the version before the modules were moved: it must be read for ever."""
