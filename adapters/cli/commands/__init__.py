"""The commands, one file each: a module of this package has the command of its own name."""
