"""The command line, a module a command. Heavy imports wait until a command needs them, so that help is instant."""
